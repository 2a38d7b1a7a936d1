"""Rows as batches: padded to the longest, or packed end to end, each row seeing itself alone."""

from copy import copy

from hf_memtune.cli.arguments import CLASSES, DataSource
from hf_memtune.cli.data.making import IGNORED
from hf_memtune.errors import ConfigError


def packed(rows, data: DataSource):
    """Whole rows together in rows of up to max_length tokens, by trl; each remembers where its parts end."""
    if not data.packing:
        return rows
    from trl import pack_dataset

    return pack_dataset(rows.select_columns(["input_ids", "labels"]), data.max_length, "bfd")


def collator(data: DataSource, tokenizer):
    """Pads a batch to its longest row, on the right; padded labels are -100. With packing, one row without padding, whose positions restart in
    each part. data: resolved."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    # tokenizers that were saved for generation pad on the left, where models that number tokens from the start of the row would number padding
    tokenizer = copy(tokenizer)
    tokenizer.padding_side = "right"
    if data.task == CLASSES:
        return DataCollatorWithPadding(tokenizer)
    if data.packing:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def check_packing(data: DataSource, model, collate) -> None:
    """Raises ConfigError for a model that does not keep the parts of packed rows apart, where rows are packed. model: on the device that it is to
    run on, and in evaluation mode after it."""
    from hf_memtune.architectures.packed_rows import problem_of_packed_rows

    if getattr(data, "packing", False) and (wrong := problem_of_packed_rows(model, collate, data.max_length)):
        raise ConfigError([f"packing: {wrong}: another loss than that of the rows. Leave packing out."])
