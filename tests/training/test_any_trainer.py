"""Streaming under every trainer of trl that trains a causal language model or a reward model: by a callback, and by the mixin.

The parameters after training, the losses and trl's own metrics are those of trl's trainer alone.
"""

import json
import logging
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.support.tolerances import NOTICED, RELATIVE

trl = pytest.importorskip("trl")
pytest.importorskip("tokenizers")
pytest.importorskip("peft")

import hf_memtune  # noqa: E402
from hf_memtune.training.care.preflight.arguments import PreflightArguments  # noqa: E402
from hf_memtune.training.care.preflight.preflight import Preflight  # noqa: E402
from tests.support import trl_runs  # noqa: E402
from tests.support.trl_runs import (  # noqa: E402
    CASES,
    CHUNK,
    OURS,
    CutGradient,
    llama,
    plain,
    reward_model,
    run,
    with_callback,
    with_mixin,
)

# Of the norm of the update. An update is about 0.04 of the parameters' norm here, and each is stored to 6e-8 of itself: that alone
# is 1e-6 of the update. Plain runs that differ in how attention sums (eager, fused) lie 3e-7 to 1.2e-6 apart.
OF_THE_UPDATE = 3e-6
# Rewards of different rows are almost one number: what they have in common cancels in their differences, of which the loss is
# made. The plain runs lie 5e-6 apart, and 2e-6 where a loss is divided by the probability of what was sampled.
ROUNDING = 1e-5  # of sums of log-probabilities that cancel, in float32
ROUGHER = {"reward": 2e-5, "reward-lora": 2e-5, "sdpo": 6e-6}

# Trainers that cannot run here, by their folder: what they lack, and the line of theirs that says so.
LEFT_OUT = {
    "async_grpo": ("AsyncGRPOTrainer", "attention of a CUDA kernel, and a vLLM server", "attn_implementation=TREE_ATTENTION"),
    "async_distillation": ("AsyncDistillationTrainer", "attention of a CUDA kernel, and a vLLM server", "kernels-community/flash-attn3"),
    "server_distillation": ("ServerDistillationTrainer", "a teacher behind a vLLM server", "self.teacher_client = VLLMClient("),
}


def close_numbers(found: list[dict], expected: list[dict]) -> None:
    """Entry by entry. What is logged beside trl's own numbers is not looked at."""
    found, expected = ([entry for entry in logs if any(key.endswith("loss") for key in entry)] for logs in (found, expected))
    assert len(found) == len(expected) > 2
    for ours, theirs in zip(found, expected):
        keys = [key for key in theirs if not (key == "rewards/accuracies" and is_tied(theirs))]
        assert {key: ours.get(key) for key in keys} == pytest.approx(
            {key: theirs[key] for key in keys}, rel=RELATIVE[torch.float32], abs=ROUNDING
        )


def is_tied(entry: dict) -> bool:
    """Whether chosen and rejected answers are rewarded alike, as before the first step, where policy and reference are one: which of
    them is ahead is then a matter of rounding."""
    return abs(entry.get("rewards/margins", 1.0)) < ROUNDING


# The mixin is above a trainer's class and above its arguments': by one case of each class, and those that the trainer's loop is about.
BY_MIXIN = {case.trainer: name for name, case in reversed(CASES.items())}.values()
BY_MIXIN = {*BY_MIXIN, "sft-packing", "sft-evaluation", "sft-accumulation", "sft-saving", "dpo-lora", "grpo-iterations"}


@pytest.mark.parametrize("name, how", [(name, how) for name in CASES for how in OURS if how == "callback" or name in BY_MIXIN])
def test_it_trains_as_trl_alone(name, how):
    ours, theirs = OURS[how](name), plain(name)
    assert ours.distance(theirs) <= ROUGHER.get(name, OF_THE_UPDATE)
    close_numbers(ours.logs, theirs.logs)
    assert ours.layers.runs > theirs.layers.runs, "it ran whole rows, as trl does"
    assert theirs.layers.widest > 2 * CHUNK, "its rows are too short for chunks"


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_not_handed_back_is_noticed(name):
    """What the first step logs before it is the same to the last bit, answers that are generated included."""
    wrong, theirs = with_callback(name, CutGradient()), plain(name)
    assert wrong.distance(theirs) > NOTICED
    first, expected = ({key: value for key, value in each.logs[0].items() if key != "grad_norm"} for each in (wrong, theirs))
    assert first == expected and "loss" in first


@pytest.mark.parametrize("name", ["sft", "kto", "grpo", "online-dpo", "gkd"])
def test_a_run_is_repeated_to_the_bit(name):
    again, theirs = run(name), plain(name)
    assert again.distance(theirs) == 0.0 and again.logs == theirs.logs


def test_other_rows_are_noticed():
    assert run("sft", seed=4).distance(plain("sft")) > NOTICED


@pytest.mark.parametrize(("name", "make"), [("sft", llama), ("grpo", llama), ("reward", reward_model)])
def test_the_tolerance_is_that_of_another_order_of_summation(name, make):
    model = make()
    model.set_attn_implementation("eager")
    limit = ROUGHER.get(name, OF_THE_UPDATE)
    assert run(name, model=model).distance(plain(name)) <= limit


@pytest.mark.parametrize("name", ["sft", "sft-saving", "dpo-lora", "grpo", "reward", "distillation"])
def test_the_mixin_that_changes_nothing_is_trl_to_the_bit(name):
    off = with_mixin(name, sequence_chunk_size=None)
    assert off.distance(plain(name)) == 0.0
    assert off.losses == plain(name).losses


@pytest.mark.parametrize("name", ["sft", "dpo-lora", "tpo", "grpo", "reward", "distillation"])
def test_token_seeking_changes_the_gradient_alone(name):
    """The loss of the first step is trl's, whatever part of the tokens learns; all of them learn what they learn under trl."""
    all_of_them, theirs = with_callback(name, hf_memtune.TokenSeekingCallback(token_ratio=1.0)), plain(name)
    assert all_of_them.distance(theirs) <= ROUGHER.get(name, OF_THE_UPDATE)
    some = with_callback(name, hf_memtune.TokenSeekingCallback(token_ratio=0.3))
    assert some.losses[0] == pytest.approx(theirs.losses[0], rel=RELATIVE[torch.float32], abs=ROUNDING)
    assert some.distance(theirs) > NOTICED


MADE_IN_ITS_STEP = r"GRPOTrainer makes its batches in its own step: the data loader gives a list"


def test_a_preflight_that_is_on_by_itself_stands_aside_where_batches_are_made_in_the_step(monkeypatch, caplog):
    """As on a GPU: the run is trl's, and the report is that of its second step, and says why."""
    monkeypatch.setattr(PreflightArguments, "preflights", property(lambda args: args.memory_preflight is None))
    caplog.set_level(logging.INFO, "hf_memtune")
    found = with_mixin("grpo", sequence_chunk_size=None)
    assert found.distance(plain("grpo")) == 0.0 and found.losses == plain("grpo").losses
    report = json.loads(Path(trl_runs._FOLDER.name, "memory_report.json").read_text())
    assert report["batch"].endswith("(step 1)") and report["measured"]["phases"]
    assert re.match(f"No preflight: Efficient{MADE_IN_ITS_STEP}", report["notes"][0])
    assert [record.message for record in caplog.records if "No preflight" in record.message] == report["notes"][:1]


def test_a_preflight_that_is_asked_for_is_refused_where_batches_are_made_in_the_step(monkeypatch):
    with pytest.raises(hf_memtune.ConfigError, match=f"memory_preflight: got True, but Efficient{MADE_IN_ITS_STEP}"):
        with_mixin("grpo", memory_preflight=True)
    monkeypatch.setattr(Preflight, "_can_fly", lambda self, batch: True)  # the sibling: rows are taken for a batch
    with pytest.raises(TypeError, match="string indices"):
        with_mixin("grpo", memory_preflight=True)


def test_a_memory_report_of_a_trainer_that_makes_its_batches_in_the_step():
    with_mixin("rloo", memory_report=True)
    report = json.loads(Path(trl_runs._FOLDER.name, "memory_report.json").read_text())
    assert report["measured"]["phases"] and report["notes"] == ["Nothing is predicted: the batch has no input_ids."]


def trainers_of_trl() -> dict[str, str]:
    """By the folder of their file."""
    root = Path(trl.__file__).parent
    files = [*root.glob("trainer/*_trainer.py"), *root.glob("experimental/*/*_trainer.py")]
    named = [(file, re.findall(r"^class ([A-Z]\w*Trainer)\(", file.read_text(), re.M)) for file in files]
    return {name: file.parent.name for file, names in named for name in names}


def test_no_trainer_is_forgotten():
    run_here = {case.trainer_class.__name__ for case in CASES.values()}
    assert set(trainers_of_trl()) == run_here | {name for name, *_ in LEFT_OUT.values()}
    deprecated = import_module("trl.experimental.kto").KTOTrainer
    assert issubclass(deprecated, trl.KTOTrainer)


@pytest.mark.parametrize("folder", LEFT_OUT)
def test_what_is_left_out_lacks_what_is_said(folder):
    name, _, line = LEFT_OUT[folder]
    assert trainers_of_trl()[name] == folder
    assert line in Path(trl.__file__).parent.joinpath("experimental", folder, f"{folder}_trainer.py").read_text()


def test_the_remedy_for_losses_of_routers_works_under_trl():
    """SFTTrainer asks for them whatever the config of the model says."""
    with pytest.raises(hf_memtune.MemTuneError, match="router_aux_loss_coef=0.0"):
        run("sft-mixtral", callbacks=[hf_memtune.CheckpointCallback()])
    ours = run("sft-mixtral", callbacks=[hf_memtune.CheckpointCallback()], router_aux_loss_coef=0.0)
    assert ours.logs[0]["loss"] == run("sft-mixtral", router_aux_loss_coef=0.0).logs[0]["loss"]


def test_a_reference_that_is_kept_by_its_weights_is_refused_under_reversible_layers():
    """The same weights say something else in them."""
    reversible = hf_memtune.ReversibleCallback(hf_memtune.ReversibleConfig(reversible="centred", adapter_rank=0))
    with pytest.raises(hf_memtune.ConfigError, match="precompute_ref_log_probs=False"):
        run("dpo-precomputed", callbacks=[reversible])
    ours = run("dpo-lora", callbacks=[hf_memtune.ReversibleCallback(hf_memtune.ReversibleConfig(reversible="centred", adapter_rank=0))])
    assert abs(ours.logs[0]["loss"] - plain("dpo-lora").logs[0]["loss"]) > 1e-5
