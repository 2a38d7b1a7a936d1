"""Settings: documented, parsed from flags, and refused all at once, before a model is loaded."""

import argparse
import copy
import pickle
import warnings
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_memtune import ConfigError, MemEfficientTrainingArguments, TokenSeekingConfig, register_scorer
from hf_memtune.core import scorers
from hf_memtune.settings.presets import PRESET_NAMES, PRESETS, preset_values
from hf_memtune.settings.seeking import STREAM_CHUNKS
from hf_memtune.settings.streaming import StreamingConfig
from tests.support.runs import arguments, llama, same_parameters, text_rows, train, trainer_for

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
    flags += ["--token_selection", "sample", "--full_loss_rows", "4"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(flags)
    found = [args.token_seeking, args.token_ratio, args.token_scorer, args.gradient_norm, args.select_from, args.always_keep]
    assert found == [True, 0.2, "gradient", "l1", "labels", "first_last"]
    assert [args.seek_schedule, args.context_chunk_size, args.memory_trace_steps] == ["once", 64, 7]
    assert [args.token_selection, args.full_loss_rows] == ["sample", 4]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert not args.token_seeking and args.always_keep is None and not args.given


def test_flags_of_streaming_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--sequence_chunk_size", "128", "--use_cpu", "true"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(flags)
    assert (args.sequence_chunk_size, args.streams, args.stream_chunk_size) == (128, True, 128)
    flags = ["--output_dir", str(tmp_path), "--token_seeking", "--token_gradient", "skip", "--skip_threshold", "0.2"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses([*flags, "--use_cpu", "true"])
    assert (args.token_gradient, args.skip_threshold, args.streams) == ("skip", 0.2, True)


CHOICES = ["--gradient_norm", "--context_normalize", "--select_from", "--always_keep", "--seek_schedule"]
CHOICES += ["--preset", "--token_selection", "--token_gradient"]


@pytest.mark.parametrize("flag", CHOICES)
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
    "sequence_chunk_size": 0,
    "skip_threshold": 1.5,
    "preset": "paper",
    "token_selection": "bottom",
    "token_gradient": "none",
    "context_normalize": "max",
    "gradient_norm": "l3",
    "select_from": "prompt",
    "always_keep": "all",
    "seek_schedule": "never",
    "profit_threshold": 1.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_value_is_refused(name):
    (problem,) = problems(TokenSeekingConfig, **{name: WRONG[name]})
    assert problem.startswith(f"{name}: got {WRONG[name]!r}, expected ")


@pytest.mark.parametrize("size", [0, -1])
def test_settings_of_streaming_alone_are_checked_too(size):
    assert named(problems(StreamingConfig, sequence_chunk_size=size)) == ["sequence_chunk_size"]
    assert StreamingConfig(sequence_chunk_size=1).streams and not StreamingConfig().streams


@pytest.mark.parametrize("share, works", [(-0.01, False), (0.0, True), (1.0, True), (1.01, False), (float("nan"), False)])
def test_a_threshold_is_a_share(share, works):
    settings = {"skip_threshold": share}
    assert TokenSeekingConfig(**settings) if works else named(problems(TokenSeekingConfig, **settings)) == ["skip_threshold"]


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.01, 10, float("nan")])
def test_a_ratio_is_a_fraction(ratio):
    assert named(problems(TokenSeekingConfig, token_ratio=ratio)) == ["token_ratio"]


def test_all_problems_are_reported_at_once(tmp_path):
    ours = {"token_scorer": "nonsense", "memory_trace_steps": -1, "full_loss_rows": -1}
    wrong = WRONG | ours | {"token_seeking": True}
    expected = sorted([*WRONG, *ours, "use_liger_kernel", "neftune_noise_alpha"])
    assert named(problems(arguments, tmp_path, use_liger_kernel=True, neftune_noise_alpha=5.0, **wrong)) == expected


def test_combinations_that_cannot_work():
    both = {"context_weight": 0, "gradient_weight": 0}
    assert "both are 0" in problems(TokenSeekingConfig, token_scorer="combined", **both)[0]
    assert TokenSeekingConfig(token_scorer="random", **both)
    for schedule in ("epoch", "once"):
        assert named(problems(TokenSeekingConfig, token_scorer="random", seek_schedule=schedule)) == ["seek_schedule"]
    # what nobody typed is named with its origin
    assert "'once' of preset=tokenseek" in problems(TokenSeekingConfig, token_scorer="random", preset="tokenseek")[0]
    assert "preset" not in problems(TokenSeekingConfig, token_scorer="random", seek_schedule="once")[0]


@pytest.mark.parametrize("name", ["profit", "excess_loss"])
def test_what_changes_the_objective_is_not_drawn_by_chance(name):
    """Weights of a draw make up for what is not drawn; `labelled` reads no scores at all."""
    given = {"token_seeking": True, "token_scorer": name, "reference_model": "m" if name == "excess_loss" else None}
    (problem,) = problems(TokenSeekingConfig, **given)
    assert problem.startswith(f"token_selection: got 'sample' with token_scorer={name}") and "Set token_selection=top." in problem
    for selection in ("top", "labelled"):
        assert TokenSeekingConfig(**given, token_selection=selection)
    assert TokenSeekingConfig(**given | {"token_seeking": False}) and TokenSeekingConfig(**given | {"token_scorer": "loss"})


def test_whose_loss_is_the_mean_over_kept_tokens():
    kept = {
        name: TokenSeekingConfig(token_seeking=True, token_selection="top", token_scorer=name) for name in ("loss", "true_gradient", "own")
    }
    assert {name: config.is_mean_of_kept for name, config in kept.items()} == {"loss": True, "true_gradient": False, "own": True}
    assert not TokenSeekingConfig(token_seeking=True, token_selection="sample", token_scorer="loss").is_mean_of_kept


def test_with_a_threshold_a_ratio_of_one_keeps_not_all():
    profit = {"token_seeking": True, "token_scorer": "profit", "token_selection": "top", "token_ratio": 1.0}
    assert TokenSeekingConfig(**profit).keeps_all and not TokenSeekingConfig(**profit, profit_threshold=0.1).keeps_all
    assert TokenSeekingConfig(**profit | {"token_scorer": "loss"}, profit_threshold=0.1).keeps_all  # which does not read it


def test_where_all_tokens_are_kept_nothing_chooses_among_them():
    some = TokenSeekingConfig(token_seeking=True, token_ratio=0.9, token_scorer="loss", select_from="all")
    assert some.ineffective() == {}
    all_of_them = TokenSeekingConfig.of(some, token_ratio=1.0)
    assert all_of_them.ineffective() == dict.fromkeys(("select_from", "token_scorer"), "with token_ratio=1.0")


UNSUPPORTED = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "torch_compile": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
}


STRATEGIES = [{"token_seeking": True}, {"sequence_chunk_size": 64}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: next(iter(strategy)))
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_strategy_does_not_support_is_refused_before_anything_is_set_up(tmp_path, name, strategy, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: pytest.fail("set up already"))
    more = {"fsdp_config": {"version": 1}} if name == "fsdp" else {}  # streaming works with version 2
    (problem,) = problems(MemEfficientTrainingArguments, str(tmp_path), **strategy, **{name: UNSUPPORTED[name]}, **more)
    assert problem.startswith(name) and f"with {next(iter(strategy))}, which does not support it" in problem


@pytest.mark.parametrize("config", [{}, {"fsdp_config": {"version": 2}}], ids=["by default", "by name"])
def test_the_second_fsdp_is_refused_of_token_seeking_alone(tmp_path, config, monkeypatch):
    class SetUp(Exception):
        pass

    def set_up(self):
        raise SetUp

    monkeypatch.setattr(TrainingArguments, "__post_init__", set_up)
    with pytest.raises(SetUp):
        MemEfficientTrainingArguments(str(tmp_path), sequence_chunk_size=64, fsdp="full_shard", **config)
    (problem,) = problems(MemEfficientTrainingArguments, str(tmp_path), token_seeking=True, fsdp="full_shard", **config)
    assert problem.startswith("fsdp: got 'full_shard' with token_seeking")


def test_they_are_allowed_without_a_strategy(tmp_path):
    assert MemEfficientTrainingArguments(str(tmp_path), report_to=[], neftune_noise_alpha=5.0)


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_that_accelerate_was_told_of_is_refused(tmp_path, name):
    """`accelerate launch` may have been configured for it, of which the arguments know nothing."""
    trainer = trainer_for(llama(), arguments(tmp_path), ROWS)
    assert trainer._problems_of_method(None) == []
    setattr(trainer, name, True)
    assert "accelerate is configured" in trainer._problems_of_method(None)[0]


@pytest.mark.parametrize("setting", [{}, {"token_seeking": False, "token_ratio": None, "context_normalize": None, "reversible": "centred"}])
def test_several_devices_in_one_process_are_refused(tmp_path, setting):
    args = arguments(tmp_path, **setting)
    assert trainer_for(llama(), args, ROWS)
    args._n_gpu = 2
    (problem,) = problems(trainer_for, llama(), args, ROWS)
    assert problem.startswith("2 GPUs in one process")


# -- presets -----------------------------------------------------------------------------------------------------------

OTHER = {
    "token_ratio": 0.5, "token_scorer": "context", "context_weight": 2.0, "gradient_weight": 0.5, "context_layer": 0,
    "context_normalize": "mean", "gradient_norm": "l1", "select_from": "labels", "always_keep": "first_last",
    "seek_schedule": "epoch", "token_selection": "sample", "token_gradient": "skip",
}  # fmt: skip


def filled(settings) -> dict:
    return {name: getattr(settings, name) for name in PRESETS[None]}


def test_the_table_has_a_row_for_every_setting_that_can_be_left_out():
    ours = {f.name: f.metadata["help"] for f in fields(TokenSeekingConfig)}
    assert PRESETS[None].keys() == OTHER.keys() == {name for name, text in ours.items() if "(presets: tokenseek" in text}
    assert all(PRESETS[name].keys() <= PRESETS[None].keys() for name in PRESET_NAMES)


def test_the_presets_are_those_of_the_papers():
    """The table says so; here the numbers of the papers stand a second time."""
    seek = TokenSeekingConfig(token_seeking=True, preset="tokenseek")
    assert (seek.token_scorer, seek.context_weight, seek.gradient_weight) == ("combined", 1.0, 1.0)
    assert (seek.context_layer, seek.context_normalize, seek.gradient_norm) == (-1, "sum", "l2")
    assert (seek.token_ratio, seek.select_from, seek.seek_schedule, seek.kept_always) == (0.1, "all", "once", "none")
    tune = TokenSeekingConfig(token_seeking=True, preset="tokentune")
    assert (tune.token_scorer, tune.token_ratio, tune.kept_always) == ("random", 0.1, "first_last")
    assert (tune.seek_schedule, tune.select_from) == ("step", "all")
    assert all((paper.token_selection, paper.token_gradient) == ("top", "cut") for paper in (seek, tune))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OTHER)
def test_what_is_given_wins_over_a_preset(preset, name):
    if (preset, name) == ("tokentune", "seek_schedule"):
        pytest.skip("a random choice has one schedule")
    settings = TokenSeekingConfig(preset=preset, **{name: OTHER[name]})
    assert filled(settings) == preset_values(preset) | {name: OTHER[name]} and settings.given == {name}
    assert filled(TokenSeekingConfig(preset=preset)) == preset_values(preset)


def test_what_is_given_wins_even_where_it_is_the_librarys_own():
    settings = TokenSeekingConfig(preset="tokenseek", seek_schedule=PRESETS[None]["seek_schedule"])
    assert settings.seek_schedule == "step" != TokenSeekingConfig(preset="tokenseek").seek_schedule
    assert settings.given == {"seek_schedule"}


def again(settings):
    return type(settings)(**{f.name: getattr(settings, f.name) for f in fields(settings)})


COPIES = {"of": TokenSeekingConfig.of, "replace": replace, "again": again, "copy": copy.deepcopy}
COPIES["pickle"] = lambda settings: pickle.loads(pickle.dumps(settings))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_same_settings_and_the_same_of_them_given(copied, preset):
    for given in ({}, {"token_ratio": 0.5}, {"context_layer": 0, "context_weight": 2.0}):
        settings = TokenSeekingConfig(preset=preset, **given)
        found = copied(copied(settings))
        assert found == settings and found.given == given.keys()
    assert copied(TokenSeekingConfig(preset=preset)) != copied(TokenSeekingConfig(preset=preset, token_ratio=0.5))


@pytest.mark.parametrize("copied", [copied for name, copied in COPIES.items() if name not in ("replace", "again")])
def test_what_was_given_as_it_would_be_filled_stays_given(copied):
    assert copied(TokenSeekingConfig(token_ratio=0.3)).given == {"token_ratio"}
    assert replace(TokenSeekingConfig(token_ratio=0.3)).given == set()  # values alone do not say who chose them


def test_a_changed_preset_fills_what_was_not_given():
    settings = TokenSeekingConfig.of(TokenSeekingConfig(token_ratio=0.3), preset="tokentune")
    assert (settings.token_ratio, settings.token_scorer, settings.always_keep) == (0.3, "random", "first_last")
    settings = TokenSeekingConfig.of(TokenSeekingConfig(preset="tokentune"), preset=None)
    assert filled(settings) == preset_values(None)


def test_what_is_set_later_is_given():
    settings = TokenSeekingConfig()
    settings.token_ratio = 0.5
    assert settings.given == {"token_ratio"} and TokenSeekingConfig.of(settings, preset="tokentune").token_ratio == 0.5


def test_training_arguments_are_filled_and_made_again_from_their_dict(tmp_path):
    left_out = {"token_scorer": None, "token_selection": None, "select_from": None}
    args = arguments(tmp_path, preset="tokentune", token_ratio=0.2, **left_out)
    assert (args.token_scorer, args.token_ratio, args.context_normalize) == ("random", 0.2, "mean")
    assert TokenSeekingConfig.of(args).given == args.given == {"token_ratio", "context_normalize"}
    ours = {name: value for name, value in args.to_dict().items() if name in OURS}
    made = MemEfficientTrainingArguments(str(tmp_path), report_to=[], **ours)
    assert TokenSeekingConfig.of(made) == TokenSeekingConfig.of(args) != TokenSeekingConfig.of(arguments(tmp_path))


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_preset_is_a_flag(tmp_path, preset):
    flags = ["--output_dir", str(tmp_path), "--token_seeking", "--preset", preset, "--token_ratio", "0.2", "--use_cpu", "true"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(flags)
    assert filled(args) == preset_values(preset) | {"token_ratio": 0.2}


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, size",
    [
        ({}, None),
        ({"sequence_chunk_size": 100}, 100),
        ({"token_gradient": "stream"}, None),  # token seeking is off
        ({"token_seeking": True}, None),
        ({"token_seeking": True, "sequence_chunk_size": 100}, None),
        ({"token_seeking": True, "token_gradient": "stream"}, STREAM_CHUNKS["stream"]),
        ({"token_seeking": True, "token_gradient": "skip"}, STREAM_CHUNKS["skip"]),
        ({"token_seeking": True, "token_gradient": "skip", "sequence_chunk_size": 100}, 100),
    ],
)
def test_what_streams_and_in_which_chunks(settings, size):
    found = TokenSeekingConfig(**settings)
    assert (found.streams, found.stream_chunk_size) == (size is not None, size)


OFFLOADING = [{"sequence_chunk_size": 64}] + [{"token_seeking": True, "token_gradient": kind} for kind in STREAM_CHUNKS]


@pytest.mark.parametrize("settings", OFFLOADING, ids=lambda settings: settings.get("token_gradient", "exact"))
def test_offloading_needs_a_device_with_memory_of_its_own(tmp_path, settings, monkeypatch):
    make = MemEfficientTrainingArguments
    (problem,) = problems(make, str(tmp_path), use_cpu=True, report_to=[], kv_offload=True, **settings)
    assert problem.startswith("kv_offload: got True, but the device is cpu")
    assert make(str(tmp_path), use_cpu=True, report_to=[], **settings)
    assert TokenSeekingConfig(kv_offload=True, **settings).kv_offload  # whoever calls the strategy itself may
    monkeypatch.setattr(make, "device", torch.device("cuda"))
    assert StreamingConfig.of(make(str(tmp_path), use_cpu=True, report_to=[], kv_offload=True, **settings)).kv_offload


def test_offloading_is_a_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(MemEfficientTrainingArguments, "device", torch.device("cuda"))
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--sequence_chunk_size", "64"]
    parse = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses
    assert parse([*flags, "--kv_offload"])[0].kv_offload and not parse(flags)[0].kv_offload


# -- what has no effect ------------------------------------------------------------------------------------------------

IDLE = [
    ({"token_scorer": "random"}, {"context_weight": 2.0, "gradient_norm": "l1", "context_layer": 0, "context_normalize": "mean"}),
    ({"token_scorer": "random", "token_selection": "sample"}, {"sample_floor": 0.1}),
    ({"token_scorer": "context", "token_selection": "sample", "sample_floor": 0.1}, {"context_weight": 2.0}),
    ({"token_scorer": "context"}, {"gradient_weight": 2.0, "gradient_norm": "l1"}),
    ({"token_scorer": "gradient"}, {"context_weight": 2.0, "context_layer": 0, "context_normalize": "mean"}),
    ({"seek_schedule": "epoch"}, {"seek_cache_dir": "x"}),
    ({"token_gradient": "cut"}, {"sequence_chunk_size": 64, "skip_threshold": 0.1, "kv_offload": True}),
    ({"token_gradient": "stream", "sequence_chunk_size": 64}, {"context_chunk_size": 64, "skip_threshold": 0.1}),
    ({"token_gradient": "skip", "skip_threshold": 0.1}, {"context_chunk_size": 64}),
    ({"token_scorer": "true_gradient"}, {"context_layer": 0, "reference_model": "m"}),
    ({"token_scorer": "loss"}, {"gradient_norm": "l1", "context_normalize": "mean", "profit_threshold": 0.1}),
    ({"token_selection": "labelled"}, {"profit_threshold": 0.1, "token_ratio": 0.2}),
    ({"preset": "tokentune"}, {"context_weight": 1.0, "gradient_norm": "l2"}),  # given, if only what it would be anyway
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
    changed = {"token_ratio": 0.2, "select_from": "labels", "seek_schedule": "epoch", "preset": "tokenseek", "full_loss_rows": 4}
    changed |= {"kv_offload": True}  # nor does anything stream
    make = MemEfficientTrainingArguments
    assert warned(make, str(tmp_path), report_to=[], **changed) == sorted(changed)
    assert warned(make, str(tmp_path), report_to=[], token_ratio=PRESETS[None]["token_ratio"]) == ["token_ratio"]
    assert warned(make, str(tmp_path), report_to=[], sequence_chunk_size=64) == warned(make, str(tmp_path), report_to=[]) == []


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
    given = train(llama(), arguments(tmp_path, token_scorer=None, **plain), ROWS, token_scorer=first_tokens)
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
    """By transformers, which takes the loss."""
    with pytest.raises(ValueError, match="did not return a loss.*input_ids"):
        train(llama(), arguments(tmp_path), [{"input_ids": row["input_ids"]} for row in ROWS])


# -- search of hyperparameters -----------------------------------------------------------------------------------------


@pytest.fixture
def no_backend(monkeypatch):
    """transformers knows trials by the classes of backends, none of which is needed here."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)


def searched(tmp_path, *trials, **settings):
    """A trainer, and one training for each trial, as a search of hyperparameters makes them; yields after each."""
    trainer = trainer_for(None, arguments(tmp_path, **settings), ROWS, model_init=lambda: llama())
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    for number, params in enumerate(trials):
        trainer.hp_space = lambda trial: trial.params
        trainer.train(trial=SimpleNamespace(params=params, number=number))
        yield trainer
        trainer.model = None  # as between the trials of a search


def test_a_search_trains_with_what_each_trial_asks_for(no_backend, tmp_path):
    """Also with the first; the sibling at another ratio learns something else."""
    ratios = [0.25, 0.5]
    found = [weights_of(trainer.model) for trainer in searched(tmp_path / "search", *({"token_ratio": ratio} for ratio in ratios))]
    alone = [trainer_for(None, arguments(tmp_path, token_ratio=ratio), ROWS, model_init=lambda: llama()) for ratio in ratios]
    for trainer in alone:
        trainer.train()
    alone = [weights_of(trainer.model) for trainer in alone]
    assert all(torch.equal(*pair) for pair in zip(found, alone))
    assert not torch.equal(*found)


def weights_of(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    "settings, trial, told",
    [
        (
            {"token_seeking": False, "token_ratio": None, "context_normalize": None},
            {"token_seeking": True},
            "asks for token_seeking.*no method",
        ),
        ({}, {"token_seeking": False}, "asks for no method.*with token_seeking"),
        ({}, {"token_ratio": 1.5}, "token_ratio"),
        ({}, {"checkpoint_levels": 2}, "changed since the trainer was made"),
    ],
    ids=["on", "off", "bad", "layers"],
)
def test_a_search_that_cannot_be_followed_is_refused(no_backend, tmp_path, settings, trial, told):
    with pytest.raises(ConfigError, match=told):
        list(searched(tmp_path, trial, **settings))


def test_a_search_over_scorers_beside_a_function_is_refused(no_backend, tmp_path):
    """The function would be what scores in every trial."""
    args = arguments(tmp_path, token_scorer=None)
    trainer = trainer_for(None, args, ROWS, model_init=lambda: llama(), token_scorer=lambda seen: seen.context_score)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    with pytest.raises(ConfigError, match="token_scorer: got a function and args.token_scorer='loss'"):
        trainer.train(trial=SimpleNamespace(params={"token_scorer": "loss"}, number=0))


def test_a_trial_that_was_refused_spoils_no_other(no_backend, tmp_path):
    trainer = trainer_for(None, arguments(tmp_path), ROWS, model_init=lambda: llama())
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, ratio in enumerate((1.5, 0.5)):
        with pytest.raises(ConfigError, match="token_ratio: got 1.5") if ratio > 1 else nullcontext():
            trainer.train(trial=SimpleNamespace(params={"token_ratio": ratio}, number=number))
    assert trainer.method_callback.config.token_ratio == 0.5 and trainer.state.global_step == 2


def test_a_search_logs_what_each_trial_takes(no_backend, tmp_path):
    settings = {"token_selection": "sample", "select_from": "labels", "context_normalize": None, "token_scorer": "loss"}
    logged = []
    for trainer in searched(tmp_path, {"token_selection": "top"}, {"token_selection": "sample"}, **settings):
        logged.append(any("full_loss" in entry for entry in trainer.state.log_history))
    assert logged == [True, False]
