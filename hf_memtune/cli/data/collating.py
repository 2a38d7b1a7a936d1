"""Rows as batches: padded to the longest, or packed end to end, each row seeing itself alone."""

from hf_memtune.cli.arguments import CLASSES, DataSource
from hf_memtune.cli.data.making import IGNORED


def packed(rows, data: DataSource):
    """Whole rows together in rows of up to max_length tokens, by trl; each remembers where its parts end."""
    if not data.packing:
        return rows
    from trl import pack_dataset

    return pack_dataset(rows.select_columns(["input_ids", "labels"]), data.max_length, "bfd")


def collator(data: DataSource, tokenizer):
    """Pads a batch to its longest row; padded labels are -100. With packing, one row without padding, whose positions restart in each
    part. data: resolved."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if data.task == CLASSES:
        return DataCollatorWithPadding(tokenizer)
    if data.packing:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
