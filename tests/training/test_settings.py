"""Settings: documented, parsed from flags, and refused all at once, before a model is loaded."""

import argparse
import warnings
from dataclasses import fields

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import HfArgumentParser, TrainingArguments

from hf_memtune import ConfigError, MemEfficientTrainingArguments, MemTuneError, TokenSeekingConfig, register_scorer
from hf_memtune.core import scorers
from tests.training.runs import arguments, llama, same_parameters, text_rows, train, trainer_for

ROWS = text_rows(8)
OURS = {f.name: f for f in fields(MemEfficientTrainingArguments)}.keys() - {f.name for f in fields(TrainingArguments)}


def problems(make, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def named(found: list[str]) -> list[str]:
    return sorted(problem.split(":")[0] for problem in found)


# -- help and flags ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_setting_is_explained(name):
    text = {f.name: f for f in fields(MemEfficientTrainingArguments)}[name].metadata["help"]
    assert len(text) > 40 and text.endswith(".")
    assert text % () == text.replace("%%", "%")  # argparse formats it


def test_help_can_be_shown(capsys):
    with pytest.raises(SystemExit) as left:
        HfArgumentParser(MemEfficientTrainingArguments).parse_args(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in OURS)


def test_flags_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--token_seeking", "--token_ratio", "0.2", "--token_scorer", "gradient"]
    flags += ["--gradient_norm", "l1", "--select_from", "labels", "--always_keep", "first_last", "--seek_schedule", "once"]
    flags += ["--seek_cache_dir", str(tmp_path), "--context_chunk_size", "64", "--memory_trace_steps", "7", "--use_cpu", "true"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(flags)
    found = [args.token_seeking, args.token_ratio, args.token_scorer, args.gradient_norm, args.select_from, args.always_keep]
    assert found == [True, 0.2, "gradient", "l1", "labels", "first_last"]
    assert [args.seek_schedule, args.context_chunk_size, args.memory_trace_steps] == ["once", 64, 7]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert not args.token_seeking and args.always_keep is None


@pytest.mark.parametrize("flag", ["--gradient_norm", "--context_normalize", "--select_from", "--always_keep", "--seek_schedule"])
def test_flags_with_choices_name_them(flag, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(MemEfficientTrainingArguments).parse_args(["--output_dir", "x", flag, "wrong"])
    assert "invalid choice: 'wrong'" in capsys.readouterr().err


def test_a_percent_sign_has_to_be_escaped():
    """Sibling: what the test of the help texts guards against."""
    parser = argparse.ArgumentParser()
    with pytest.raises((ValueError, TypeError)):
        parser.add_argument("--x", help="half (50%) of it")
        parser.format_help()


# -- what cannot work --------------------------------------------------------------------------------------------------

WRONG = {
    "token_ratio": 0.0,
    "context_weight": -1.0,
    "gradient_weight": -0.5,
    "context_chunk_size": 0,
    "context_normalize": "max",
    "gradient_norm": "l3",
    "select_from": "prompt",
    "always_keep": "all",
    "seek_schedule": "never",
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_value_is_refused(name):
    (problem,) = problems(TokenSeekingConfig, **{name: WRONG[name]})
    assert problem.startswith(f"{name}: got {WRONG[name]!r}, expected ")


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.01, 10, float("nan")])
def test_a_ratio_is_a_fraction(ratio):
    assert named(problems(TokenSeekingConfig, token_ratio=ratio)) == ["token_ratio"]


def test_all_problems_are_reported_at_once(tmp_path):
    wrong = WRONG | {"token_seeking": True, "token_scorer": "nonsense", "memory_trace_steps": -1}
    expected = sorted([*WRONG, "token_scorer", "memory_trace_steps", "use_liger_kernel", "neftune_noise_alpha"])
    assert named(problems(arguments, tmp_path, use_liger_kernel=True, neftune_noise_alpha=5.0, **wrong)) == expected


def test_combinations_that_cannot_work():
    both = {"context_weight": 0, "gradient_weight": 0}
    assert "both are 0" in problems(TokenSeekingConfig, **both)[0]
    assert TokenSeekingConfig(token_scorer="random", **both)
    for schedule in ("epoch", "once"):
        assert named(problems(TokenSeekingConfig, token_scorer="random", seek_schedule=schedule)) == ["seek_schedule"]


UNSUPPORTED = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "torch_compile": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_seeking_does_not_support_is_refused_before_anything_is_set_up(tmp_path, name, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: pytest.fail("set up already"))
    (problem,) = problems(MemEfficientTrainingArguments, str(tmp_path), token_seeking=True, **{name: UNSUPPORTED[name]})
    assert problem.startswith(name) and "does not support" in problem


def test_they_are_allowed_without_seeking(tmp_path):
    assert arguments(tmp_path, token_seeking=False, token_ratio=0.1, context_normalize="sum", neftune_noise_alpha=5.0)


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_that_accelerate_was_told_of_is_refused(tmp_path, name):
    """`accelerate launch` may have been configured for it, of which the arguments know nothing."""
    trainer = trainer_for(llama(), arguments(tmp_path), ROWS)
    assert trainer._problems(None) == []
    setattr(trainer, name, True)
    assert "accelerate is configured" in trainer._problems(None)[0]


# -- what has no effect ------------------------------------------------------------------------------------------------

IDLE = [
    ({"token_scorer": "random"}, {"context_weight": 2.0, "gradient_norm": "l1", "context_layer": 0, "context_normalize": "mean"}),
    ({"token_scorer": "context"}, {"gradient_weight": 2.0, "gradient_norm": "l1"}),
    ({"token_scorer": "gradient"}, {"context_weight": 2.0, "context_layer": 0, "context_normalize": "mean"}),
    ({"seek_schedule": "epoch"}, {"seek_cache_dir": "x"}),
]


def warned(make, *args, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(*args, **kwargs)
    return sorted(str(w.message).split(" ")[0] for w in caught if "has no effect" in str(w.message))


@pytest.mark.parametrize("settings, idle", IDLE)
def test_a_setting_without_effect_is_warned_of(tmp_path, settings, idle):
    make = MemEfficientTrainingArguments
    assert warned(make, str(tmp_path), token_seeking=True, report_to=[], **settings, **idle) == sorted(idle)
    assert warned(make, str(tmp_path), token_seeking=True, report_to=[], **settings) == []


def test_everything_but_the_switch_is_idle_without_seeking(tmp_path):
    changed = {"token_ratio": 0.2, "select_from": "labels", "seek_schedule": "epoch"}
    assert warned(MemEfficientTrainingArguments, str(tmp_path), report_to=[], **changed) == sorted(changed)


# -- scorers and the trainer -------------------------------------------------------------------------------------------


def first_tokens(seen):
    return -torch.arange(seen.attention_mask.shape[1]).expand(seen.attention_mask.shape)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(scorers, "_REGISTERED", {})
    register_scorer("first_tokens", first_tokens)


def test_a_registered_scorer_is_used_by_its_name(tmp_path, registered):
    plain = {"context_normalize": "sum", "max_steps": 1}
    named_run = train(llama(), arguments(tmp_path, token_scorer="first_tokens", **plain), ROWS)
    given = train(llama(), arguments(tmp_path, **plain), ROWS, token_scorer=first_tokens)
    other = train(llama(), arguments(tmp_path, token_scorer="gradient", **plain), ROWS)
    assert same_parameters(named_run, given) and not same_parameters(named_run, other)


def test_an_unknown_scorer_is_refused_with_the_known_names(tmp_path, registered):
    (problem,) = problems(arguments, tmp_path, token_scorer="last_tokens", context_normalize="sum")
    assert "combined" in problem and "first_tokens" in problem


def test_a_scorer_needs_seeking(tmp_path):
    args = arguments(tmp_path, token_seeking=False, token_ratio=0.1, context_normalize="sum")
    assert "token_seeking" in problems(trainer_for, llama(), args, ROWS, token_scorer=first_tokens)[0]


def test_a_scorer_is_named_once(tmp_path):
    args = arguments(tmp_path, token_scorer="gradient", context_normalize="sum")
    assert "Leave one" in problems(trainer_for, llama(), args, ROWS, token_scorer=first_tokens)[0]


def test_arguments_of_another_class_are_refused(tmp_path):
    for args in (arguments(tmp_path, seeking=False), None):
        (problem,) = problems(trainer_for, llama(), args, ROWS)
        assert "got TrainingArguments" in problem and "MemEfficientArgumentsMixin" in problem


def test_a_stream_is_not_passed_over(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            while True:
                yield from ROWS

    assert "may never end" in problems(trainer_for, llama(), arguments(tmp_path, seek_schedule="once"), Stream())[0]
    run = train(llama(), arguments(tmp_path), Stream())
    assert len(run.losses) == 2


def test_a_batch_without_labels_is_refused(tmp_path):
    with pytest.raises(MemTuneError, match="no labels.*input_ids"):
        train(llama(), arguments(tmp_path), [{"input_ids": row["input_ids"]} for row in ROWS])
