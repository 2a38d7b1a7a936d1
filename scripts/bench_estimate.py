"""Predicted against measured bytes of a training step, on a CPU: `python scripts/bench_estimate.py`.

Each line of results/estimate.jsonl is one run: what `hf_memtune.estimate` predicts of it, and the traced peak of the second optimizer step
of a real MemEfficientTrainer with the same settings, random weights and random tokens. What the file has already is not measured again.
"""

import tempfile
import time
from typing import Any

import torch
import transformers as tf
from options import parse
from store import measure

from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments, StepAccountCallback, estimate

_LLAMA = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_BERT = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4, max_position_embeddings=1024, pad_token_id=1
)
_SMOLLM2 = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "llama": lambda vocabulary: tf.LlamaConfig(vocab_size=vocabulary, **_LLAMA),
    "qwen3": lambda vocabulary: tf.Qwen3Config(vocab_size=vocabulary, head_dim=16, **_LLAMA),
    "mistral, window 64": lambda vocabulary: tf.MistralConfig(vocab_size=vocabulary, sliding_window=64, **_LLAMA),
    "gemma2, window 64": lambda vocabulary: tf.Gemma2Config(
        vocab_size=vocabulary, head_dim=16, sliding_window=64, attn_implementation="eager", **_LLAMA | {"num_hidden_layers": 10}
    ),
    "gpt2": lambda vocabulary: tf.GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=5, n_head=4, n_positions=1024),
    "bert": lambda vocabulary: tf.BertConfig(vocab_size=vocabulary, **_BERT),
    "roberta": lambda vocabulary: tf.RobertaConfig(vocab_size=vocabulary, **_BERT),
    "SmolLM2-135M": lambda vocabulary: tf.LlamaConfig(vocab_size=vocabulary, **_SMOLLM2),
}
_SCORED = {"token_scorer": "combined", "select_from": "all", "token_selection": "top", "always_keep": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": True},
    "logit-free loss": {"sequence_chunk_size": 4096},
    "streaming 32": {"sequence_chunk_size": 32},
    "streaming 64 + checkpointing": {"sequence_chunk_size": 64, "activation_checkpointing": True},
    "seeking 0.1": {"token_seeking": True, "token_ratio": 0.1, "activation_checkpointing": True} | _SCORED,
    "seeking 0.5": {"token_seeking": True, "token_ratio": 0.5} | _SCORED,
    "seeking": {"token_seeking": True},
    "TokenTune 0.3": {"token_seeking": True, "token_ratio": 0.3, "preset": "tokentune"},
    "seeking 0.3, stream": {"token_seeking": True, "token_ratio": 0.3, "token_gradient": "stream", "sequence_chunk_size": 32} | _SCORED,
    "two levels": {"checkpoint_levels": 2},
    "reversible": {"reversible": "meft1", "reversible_numerics": "float"},
}
BASE = {
    "architecture": "llama", "rows": 2, "tokens": 128, "vocabulary": 1000, "lora_rank": None, "method": "plain", "optimizer": "adamw_torch",
    "micro_batches": 1, "padded": False, "bf16": False,
}  # fmt: skip


def grid() -> list[dict]:
    """One thing at a time, and some things together."""
    rows = [BASE | {"method": method, "lora_rank": rank} for method in METHODS for rank in (None, 8) if (method, rank) != ("reversible", 8)]
    rows += [BASE | {"rows": count, "tokens": tokens} for count, tokens in ((1, 64), (8, 64), (1, 512), (4, 256))]
    rows += [BASE | {"vocabulary": size, "method": method} for size in (50, 20000) for method in ("plain", "streaming 32", "seeking 0.1")]
    rows += [BASE | {"lora_rank": rank} for rank in (1, 64)]
    rows += [BASE | {"optimizer": name} for name in ("sgd", "adafactor", "adamw_torch_fused", "adamw_8bit")]
    rows += [BASE | {"micro_batches": 3, "method": method} for method in ("plain", "seeking 0.1", "streaming 32")]
    rows += [BASE | {"padded": True, "method": method} for method in ("plain", "checkpointing", "streaming 32", "seeking 0.5")]
    rows += [BASE | {"bf16": True, "lora_rank": 8, "method": method} for method in ("plain", "seeking 0.1", "streaming 32")]
    for name in ("qwen3", "mistral, window 64", "gemma2, window 64", "gpt2"):
        rows += [BASE | {"architecture": name, "method": method} for method in ("plain", "streaming 32", "seeking 0.5")]
    rows += [BASE | {"architecture": name, "method": method} for name in ("bert", "roberta") for method in ("plain", "seeking 0.5")]
    large = BASE | {"architecture": "SmolLM2-135M", "vocabulary": 49152, "rows": 1, "tokens": 512, "lora_rank": 8}
    rows += [large | {"method": method} for method in ("plain", "checkpointing", "streaming 64 + checkpointing", "seeking 0.1")]
    return rows


def model_of(row: dict) -> torch.nn.Module:
    """A model with random weights: a classifier of rows for encoders, a language model for the others."""
    config = CONFIGS[row["architecture"]](row["vocabulary"])
    classifies = row["architecture"] in ("bert", "roberta")
    auto = tf.AutoModelForSequenceClassification if classifies else tf.AutoModelForCausalLM
    model = auto.from_config(config)
    if row["lora_rank"] is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=row["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM"))


def data_of(row: dict) -> list[dict]:
    """Rows for two optimizer steps; padded: every second one is a token shorter."""
    classifies, count = row["architecture"] in ("bert", "roberta"), 2 * row["rows"] * row["micro_batches"]
    ids = torch.randint(5, row["vocabulary"], (count, row["tokens"]), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for number, tokens in enumerate(ids):
        filled = int(row["padded"] and number % 2)
        mask = [1] * (len(tokens) - filled) + [0] * filled
        labels = number % 2 if classifies else [token if real else -100 for token, real in zip(tokens, mask)]
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
        if row["architecture"] == "bert":
            found[-1]["token_type_ids"] = [0] * len(tokens)
    return found


def stacked(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def arguments_of(row: dict, folder: str) -> MemEfficientTrainingArguments:
    return MemEfficientTrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", max_steps=2,
        memory_trace_steps=0, full_loss_rows=0, optim=row["optimizer"], per_device_train_batch_size=row["rows"], bf16=row["bf16"],
        gradient_accumulation_steps=row["micro_batches"], **METHODS[row["method"]],
    )  # fmt: skip


def compare(row: dict) -> dict:
    """What was predicted, what was measured, and how they compare."""
    with tempfile.TemporaryDirectory() as folder:
        model, args = model_of(row), arguments_of(row, folder)
        began = time.perf_counter()
        predicted = estimate(model, args, sequence_length=row["tokens"], padded=row["padded"])
        seconds = time.perf_counter() - began
        trainer = MemEfficientTrainer(model=model, args=args, train_dataset=data_of(row), data_collator=stacked)
        taken = StepAccountCallback(trainer)
        trainer.add_callback(taken)
        trainer.train()
    measured = taken.account
    phases = {phase.phase: [phase.peak_bytes, measured.phase(phase.phase).peak_bytes] for phase in predicted.account.phases}
    return {
        "predicted_bytes": predicted.peak_bytes, "measured_bytes": measured.peak_bytes, "ratio": predicted.peak_bytes / measured.peak_bytes,
        "phases": phases, "extrapolated": predicted.extrapolated, "seconds": round(seconds, 2),
    }  # fmt: skip


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "estimate", given)
    described = {"device": "cpu", "dtype": "float32", "attention": "sdpa", "threads": torch.get_num_threads()}
    measure(options.out, grid(), compare, "Comparing", **described)


if __name__ == "__main__":
    main()
