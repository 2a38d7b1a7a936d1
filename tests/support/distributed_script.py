"""Short runs, by one process or by several: `python distributed_script.py FOLDER`. Process 0 leaves gradients and losses there.

Every step sees the same 8 rows in the same order however many processes share them. Four of the first rows have no
label: cut into micro-batches of two, process 0 has nothing to learn from in the whole first step.
"""

import gc
import sys
from datetime import timedelta
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support import patience  # noqa: E402
from tests.support.runs import arguments, exact_model, text_rows, train  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

ROWS_A_STEP = 8
ROWS = [row | {"labels": [-100] * len(row["labels"])} if n in (0, 1, 4, 5) else row for n, row in enumerate(text_rows(24))]


def lora_model():
    set_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny_model("llama", dtype=torch.float64), config)


def classifier():
    return tiny_model("bert", "token_classification", dtype=torch.float64)


def masked_lm():
    """Its head has a bias of its own."""
    return tiny_model("bert", "masked_lm", dtype=torch.float64)


def deep_model():
    return tiny_model("llama", dtype=torch.float64, num_hidden_layers=4)


STREAMED = {"token_seeking": False, "sequence_chunk_size": 4}
FLOWN = {"memory_preflight": True, "memory_report": False}
CASES = {
    "whole": (exact_model, 1, {}),
    "accumulated": (exact_model, 2, {}),
    "streamed": (exact_model, 2, STREAMED),
    "streamed after a preflight": (exact_model, 2, STREAMED | FLOWN),
    "accumulated after a preflight": (exact_model, 2, FLOWN),
    "lora after a preflight": (lora_model, 2, FLOWN | {"activation_checkpointing": True}),
    "own mean": (exact_model, 2, {"average_tokens_across_devices": False}),
    "lora": (lora_model, 2, {}),
    "checkpointed": (lora_model, 2, {"activation_checkpointing": True}),
    "once": (exact_model, 1, {"seek_schedule": "once", "seek_cache_dir": "cache"}),
    "epoch": (exact_model, 1, {"seek_schedule": "epoch"}),
    "logits": (classifier, 2, {}),
    "head with bias": (masked_lm, 2, {"activation_checkpointing": True}),
    "seeking reversibly": (deep_model, 2, {"reversible": "centred", "token_scorer": "context"}),
    "reversible": (deep_model, 1, {"reversible": "meft1", "token_seeking": False, "adapter_init_std": 0.2}),
    "two levels": (deep_model, 2, {"checkpoint_levels": 2}),
}


def run_case(name: str, folder: Path, processes: int) -> dict:
    make_model, accumulation, settings = CASES[name]
    if "seek_cache_dir" in settings:
        settings = settings | {"seek_cache_dir": str(folder / "cache")}
    size = ROWS_A_STEP // (2 * accumulation)  # one process makes the calls of two: the mean over kept tokens is that of each call
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS_A_STEP // (processes * size)}
    sizes["per_device_eval_batch_size"] = 3
    args = arguments(folder / name, train_sampling_strategy="sequential", max_steps=2, **sizes, **settings)
    rows = [row | {"labels": [label % 3 if label >= 0 else label for label in row["labels"]]} for row in ROWS] if name == "logits" else ROWS
    run = train(make_model(), args, rows)
    seeking = run.trainer.method_callback and run.trainer.method_callback.method
    return {"gradients": run.gradients, "losses": run.losses, "seeking": seeking}


def main(folder: Path) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every run
    state = PartialState(cpu=True, timeout=timedelta(seconds=patience.COLLECTIVE))
    found = {name: run_case(name, folder, state.num_processes) for name in CASES}
    if state.is_main_process:
        torch.save(found | {"processes": state.num_processes}, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
