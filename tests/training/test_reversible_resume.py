"""Resumed runs of reversible layers end where uninterrupted ones do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_memtune import (
    MemTuneError,
)
from hf_memtune.training.reversible.files import WEIGHTS
from tests.support.reversible_runs import ROWS, adapted, deep, quiet, reversible  # noqa: F401  a fixture for all
from tests.support.runs import arguments, same_parameters, train

SLOW = {"optim": "adamw_torch", "learning_rate": 0.05, "adapter_dropout": 0.2}


def lora_and_adapters():
    torch.manual_seed(0)
    return get_peft_model(deep(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


RESUMED = {
    "adapters": (deep, {}),
    "lora": (adapted, {"adapter_rank": 0, "adapter_init_std": None, "adapter_dropout": None}),
    "lora and adapters": (lora_and_adapters, {}),
    "all parameters": (deep, {"adapter_rank": 0, "adapter_init_std": None, "adapter_dropout": None}),
    "seeking": (deep, {"token_seeking": True, "token_ratio": 0.35, "context_normalize": "mean"}),
    "meft1": (deep, {"reversible": "meft1"}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, case):
    make_model, settings = RESUMED[case]
    settings = SLOW | {"max_steps": 5, "learning_rate": 0.01} | settings
    whole = train(make_model(), reversible(tmp_path, save_strategy="steps", save_steps=2, **settings), ROWS)
    resumed = train(make_model(), reversible(tmp_path, **settings), ROWS, resume=str(tmp_path / "checkpoint-2"))
    assert len(whole.gradients) == 5 and len(resumed.gradients) == 3
    assert same_parameters(resumed, whole) and resumed.losses == whole.losses
    assert not same_parameters(resumed, train(make_model(), reversible(tmp_path, **settings | {"max_steps": 2}), ROWS))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """The best is the worst here, so that it is not the last."""
    settings = {
        "max_steps": 3,
        "learning_rate": 30.0,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(deep(), reversible(tmp_path, **settings, **steps), ROWS, eval_dataset=ROWS).trainer
    best = load_file(f"{trainer.state.best_model_checkpoint}/{WEIGHTS}")
    assert all(torch.equal(best[name], value) for name, value in trainer.reversible.trained.items())
    last = load_file(tmp_path / "checkpoint-3" / WEIGHTS)
    assert trainer.state.best_global_step < 3 and not all(torch.equal(best[name], value) for name, value in last.items())


@pytest.mark.parametrize("changed", [{"reversible_scale": 0.125}, {"reversible_layers": 3}, {"adapter_activation": "gelu"}])
def test_a_run_is_resumed_with_its_own_settings(tmp_path, changed):
    train(deep(), reversible(tmp_path, save_strategy="steps", save_steps=1), ROWS)
    with pytest.raises(MemTuneError, match=f"other settings.*{next(iter(changed))}"):
        train(deep(), reversible(tmp_path, **changed), ROWS, resume=str(tmp_path / "checkpoint-1"))


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    train(deep(), reversible(tmp_path / "ours", save_strategy="steps", save_steps=1), ROWS)
    train(deep(), arguments(tmp_path / "plain", token_seeking=False, save_strategy="steps", save_steps=1), ROWS)
    with pytest.raises(MemTuneError, match="got a checkpoint of reversible layers"):
        train(deep(), arguments(tmp_path, token_seeking=False), ROWS, resume=str(tmp_path / "ours/checkpoint-1"))
    with pytest.raises(MemTuneError, match="got a checkpoint without reversible layers"):
        train(deep(), reversible(tmp_path), ROWS, resume=str(tmp_path / "plain/checkpoint-1"))
