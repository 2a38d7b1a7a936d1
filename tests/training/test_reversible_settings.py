"""Settings of reversible layers and two-level checkpointing under the trainer, and what is refused."""

import pytest
import torch
from transformers import HfArgumentParser

from hf_memtune import (
    ConfigError,
    MemEfficientTrainingArguments,
    ReversibleConfig,
    make_reversible,
)
from tests.support.reversible_runs import ROWS, deep, quiet, reversible  # noqa: F401  a fixture for all
from tests.support.runs import arguments, trainer_for


def test_flags_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--reversible", "meft1", "--reversible_scale", "0.25"]
    flags += ["--reversible_beta", "0.5", "--reversible_numerics", "exact", "--reversible_layers", "3", "--reversible_output", "mean"]
    flags += ["--adapter_rank", "64", "--adapter_dropout", "0.1", "--adapter_activation", "gelu", "--train_head", "true"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses([*flags, "--no_reversible_require_exact"])
    expected = ReversibleConfig(
        reversible="meft1", reversible_scale=0.25, reversible_beta=0.5, reversible_layers=3, reversible_output="mean", adapter_rank=64,
        adapter_dropout=0.1, adapter_activation="gelu", train_head=True,
    )  # fmt: skip
    assert ReversibleConfig.of(args) == expected and args.is_reversible and not args.reversible_require_exact
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--checkpoint_levels", "2"]
    (args,) = HfArgumentParser(MemEfficientTrainingArguments).parse_args_into_dataclasses(flags)
    assert args.checkpoint_levels == 2 and not args.is_reversible and args.reversible_require_exact


def test_all_problems_at_once(tmp_path):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), token_ratio=2, adapter_rank=-1, checkpoint_levels=3, memory_trace_steps=-1)
    found = [problem.split(":")[0] for problem in raised.value.problems]
    assert found == ["token_ratio", "adapter_rank", "checkpoint_levels", "memory_trace_steps"]


UNSUPPORTED = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "torch_compile": True,
    "use_liger_kernel": True,
    "activation_checkpointing": True,
}


@pytest.mark.parametrize("strategy", [{"reversible": "centred"}, {"checkpoint_levels": 2}], ids=["reversible", "checkpoint_levels"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused(tmp_path, name, strategy):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), **strategy, **{name: UNSUPPORTED[name]})
    (problem,) = raised.value.problems
    assert problem.startswith(name) and f"with {next(iter(strategy))}, which does not support it" in problem


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"sequence_chunk_size": 8}, "sequence_chunk_size"),
        ({"token_seeking": True, "token_gradient": "skip"}, "token_gradient"),
        ({"checkpoint_levels": 2}, "reversible"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, named):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), reversible="centred", **settings)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{named}: got") and "reversible" in problem and "leave one out" in problem
    MemEfficientTrainingArguments(str(tmp_path), use_cpu=True, **settings)  # each is fine by itself


def test_one_argument_that_two_strategies_refuse_is_named_once(tmp_path):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), reversible="centred", token_seeking=True, torch_compile=True)
    assert len(raised.value.problems) == 1


def test_what_has_no_effect_is_named(tmp_path):
    with pytest.warns(UserWarning) as warned:
        MemEfficientTrainingArguments(str(tmp_path), use_cpu=True, adapter_rank=4)
    assert [str(each.message).split()[0] for each in warned] == ["adapter_rank"]


# -- what only a trainer can see ---------------------------------------------------------------------------------------


def test_exactness_is_asked_of_reversible_layers_that_were_loaded_too(tmp_path, recwarn):
    args = arguments(tmp_path, seeking=False, cls=MemEfficientTrainingArguments, reversible_require_exact=False)
    handle = make_reversible(deep(), ReversibleConfig("centred"))
    assert not trainer_for(handle.model, args, ROWS, reversible=handle).reversible_callback.require_exact
    assert not [each for each in recwarn if "reversible_require_exact" in str(each.message)]
    with pytest.warns(UserWarning, match="reversible_require_exact has no effect without reversible layers"):
        trainer_for(deep(), args, ROWS)


def test_an_optimizer_made_before_the_adapters_is_refused(tmp_path):
    model = deep()
    with pytest.raises(ConfigError, match="optimizers"):
        trainer_for(model, reversible(tmp_path), ROWS, optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(ConfigError, match="model_init"):
        trainer_for(None, reversible(tmp_path), ROWS, model_init=lambda: deep())


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_that_accelerate_was_told_of_is_refused(tmp_path, name):
    trainer = trainer_for(deep(), reversible(tmp_path), ROWS)
    assert trainer._problems_of_layers(None) == []
    setattr(trainer, name, True)
    (problem,) = trainer._problems_of_layers(None)
    assert "which reversible does not support" in problem
    assert ("saving and resuming of sharded adapters" in problem) == (name == "is_fsdp_enabled")


def test_changed_arguments_are_refused(tmp_path):
    trainer = trainer_for(deep(), reversible(tmp_path), ROWS)
    trainer.args.reversible_scale = 0.25
    with pytest.raises(ConfigError, match="Make a new trainer"):
        trainer.train()
