"""Reversible layers and two-level checkpointing under the trainer: exact steps, resumed runs, refusals, and nothing left behind."""

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer

from hf_memtune import (
    ConfigError,
    InverseError,
    MemEfficientTrainer,
    MemEfficientTrainingArguments,
    MemTuneError,
    ReversibleCallback,
    ReversibleConfig,
    StreamOverflowError,
)
from tests.strategies.reversible_models import twin
from tests.strategies.tiny_models import tiny_model
from tests.tolerances import NOTICED, tolerance
from tests.training.runs import SEEKING, arguments, same_parameters, text_rows, train, trainer_for, worst_step

ROWS = text_rows(24)
ADAPTERS = {"adapter_rank": 4, "adapter_init_std": 0.2}  # far from zero, so that they count
CENTRED = {"seeking": True, "token_seeking": False, "reversible": "centred", **ADAPTERS}


@pytest.fixture(autouse=True)
def quiet():
    """`arguments` sets some of token seeking, which is off in most runs here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no effect without token_seeking")
        yield


def deep(dtype=torch.float32, num_hidden_layers=4, **overrides):
    return tiny_model("llama", dtype=dtype, num_hidden_layers=num_hidden_layers, **overrides)


def adapted(**overrides):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(deep(**overrides), config)


def reversible(tmp_path, **settings):
    return arguments(tmp_path, **CENTRED | settings)


# -- settings ----------------------------------------------------------------------------------------------------------


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
        ({"checkpoint_levels": 2}, "checkpoint_levels"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, named):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), reversible="centred", **settings)
    (problem,) = raised.value.problems
    assert problem.startswith(named) and "reversible=centred" in problem
    MemEfficientTrainingArguments(str(tmp_path), use_cpu=True, **settings)  # each is fine by itself


def test_one_argument_that_two_strategies_refuse_is_named_once(tmp_path):
    with pytest.raises(ConfigError) as raised:
        MemEfficientTrainingArguments(str(tmp_path), reversible="centred", token_seeking=True, torch_compile=True)
    assert len(raised.value.problems) == 1


def test_what_has_no_effect_is_named(tmp_path):
    with pytest.warns(UserWarning) as warned:
        MemEfficientTrainingArguments(str(tmp_path), use_cpu=True, adapter_rank=4, reversible_require_exact=False)
    assert [str(each.message).split()[0] for each in warned] == ["reversible_require_exact", "adapter_rank"]


# -- steps -------------------------------------------------------------------------------------------------------------


class TwinTrainer(MemEfficientTrainer):
    """The same coupled network under plain autograd."""

    def training_step(self, *args, **kwargs):
        self.preflight.looks = False  # that nothing runs again in backward is an error otherwise
        with twin(self.reversible):
            return super().training_step(*args, **kwargs)


MIXED = {"plain": {}, "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, "bf16": {"bf16": True}}


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("coupling", ["centred", "meft1", "meft3"])
def test_steps_are_those_of_plain_autograd(tmp_path, coupling, mixed):
    settings = {"reversible": coupling, "max_steps": 3, "adapter_dropout": 0.2} | MIXED[mixed]
    ours, theirs = (train(deep(), reversible(tmp_path, **settings), ROWS, cls=cls) for cls in (MemEfficientTrainer, TwinTrainer))
    assert ours.losses == theirs.losses and len(ours.losses) == 3
    assert same_parameters(ours, theirs)
    assert not same_parameters(ours, train(deep(), reversible(tmp_path, **settings, seed=7), ROWS))


def test_only_adapters_are_trained(tmp_path):
    run = train(deep(), reversible(tmp_path), ROWS)
    before, after = dict(deep().named_parameters()), run.parameters
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert run.trainer.reversible.trained.keys() == after.keys() - before.keys() == run.gradients[0].keys()
    assert run.trainer.state.log_history[0]["reversible_headroom_bits"] > 0


def test_lora_inside_the_layers_without_adapters(tmp_path):
    settings = {"adapter_rank": 0, "adapter_init_std": None}
    ours, theirs = (train(adapted(), reversible(tmp_path, **settings), ROWS, cls=cls) for cls in (MemEfficientTrainer, TwinTrainer))
    assert same_parameters(ours, theirs)
    assert ours.gradients[0] and all(".lora_" in name for name in ours.gradients[0])


def test_a_plain_trainer_takes_the_callback(tmp_path):
    ours = train(deep(), reversible(tmp_path), ROWS)
    callback = ReversibleCallback(ReversibleConfig(reversible="centred", **ADAPTERS))
    plain = train(deep(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer, callbacks=[callback])
    assert plain.losses == ours.losses and same_parameters(plain, ours)
    callback.remove()
    with pytest.raises(MemTuneError, match="nothing to train"):
        plain.trainer.train()


def test_evaluation_sees_what_is_trained(tmp_path):
    trainer = train(deep(), reversible(tmp_path), ROWS, eval_dataset=ROWS).trainer
    with_adapters = trainer.evaluate()["eval_loss"]
    trainer.restore_model()
    trainer.restore_model()
    assert trainer.evaluate()["eval_loss"] == trainer_for(deep(), arguments(tmp_path), ROWS, eval_dataset=ROWS).evaluate()["eval_loss"]
    assert with_adapters != trainer.evaluate()["eval_loss"]
    assert not any("reversible" in name for name in trainer.model.state_dict())


def test_training_again_goes_on(tmp_path):
    trainer = train(deep(), reversible(tmp_path), ROWS).trainer
    before = {name: value.clone() for name, value in trainer.reversible.trained.items()}
    trainer.train()
    assert not any(torch.equal(before[name], value) for name, value in trainer.reversible.trained.items())
    trainer.restore_model()
    with pytest.raises(MemTuneError, match="nothing to train"):
        trainer.train()


class Tight(MemEfficientTrainer):
    """Has memory for four rows."""

    def training_step(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args)


@pytest.mark.parametrize("settings", [CENTRED, {"token_seeking": False, "checkpoint_levels": 2}], ids=["reversible", "two levels"])
def test_a_batch_that_does_not_fit_is_halved(tmp_path, settings):
    halved = train(deep(), arguments(tmp_path, auto_find_batch_size=True, **settings), ROWS, cls=Tight)
    small = train(deep(), arguments(tmp_path, per_device_train_batch_size=4, **settings), ROWS)
    assert same_parameters(halved, small)
    assert not same_parameters(halved, train(deep(), arguments(tmp_path, **settings), ROWS))


def test_peaks_of_memory(tmp_path):
    """Traced in every step; looking at the first batch is in none of them."""

    def peak(cls=MemEfficientTrainer, **settings):
        model = adapted(num_hidden_layers=16)  # of full training, gradients would be most of the bytes
        args = arguments(tmp_path, token_seeking=False, memory_trace_steps=1, max_steps=1, **settings)
        return train(model, args, text_rows(8, shortest=40, longest=40), cls=cls).trainer.state.log_history[0]["peak_memory_bytes"]

    coupled = {"reversible": "centred", "adapter_rank": 0}
    plain, two, ours = peak(), peak(checkpoint_levels=2), peak(**coupled)
    assert ours < plain / 2 and two < plain / 2
    assert ours == peak(cls=Unseen, **coupled)


# -- the first batch ---------------------------------------------------------------------------------------------------


class Unseen(MemEfficientTrainer):
    """Looks at nothing before the first step."""

    def _verify_layers(self, batches):
        pass


def test_the_first_batch_is_looked_at(tmp_path):
    """And nothing that training draws at random is changed by it."""
    settings = {"adapter_dropout": 0.3, "max_steps": 3}
    seen, unseen = (train(deep(), reversible(tmp_path, **settings), ROWS, cls=cls) for cls in (MemEfficientTrainer, Unseen))
    report = seen.trainer.reversible_callback.report
    assert report.is_exact and report.headroom_bits > 0 and report.loss_change != 0
    assert unseen.trainer.reversible_callback.report is None
    assert same_parameters(seen, unseen) and seen.losses == unseen.losses


class Restless:
    """A hook that computes something else every time."""

    calls = 0

    def __call__(self, module, args, output):
        self.calls += 1
        return output * (1 + 0.01 * self.calls)


def restless():
    model = deep()
    model.model.layers[1].self_attn.o_proj.register_forward_hook(Restless())
    return model


def test_a_wrong_inverse_is_refused(tmp_path, caplog):
    with pytest.raises(InverseError, match="reversible_require_exact=False"):
        train(restless(), reversible(tmp_path), ROWS)
    with caplog.at_level(logging.WARNING):
        run = train(restless(), reversible(tmp_path, reversible_require_exact=False), ROWS)
    assert "gradients would be wrong" in caplog.text and len(run.losses) == 2


def test_float_numerics_say_their_error_before_training(tmp_path):
    with pytest.warns(UserWarning, match="off by about"):
        trainer = trainer_for(deep(), reversible(tmp_path, reversible_numerics="float"), ROWS)
    trainer.train()
    assert not trainer.reversible_callback.report.is_exact


@pytest.mark.parametrize("cls", [MemEfficientTrainer, Unseen])
def test_an_overflow_raises_and_names_layer_and_remedy(tmp_path, cls):
    """On the first batch, or in a step."""
    trainer = trainer_for(deep(), reversible(tmp_path, reversible_fraction_bits=30), ROWS, cls=cls)
    before = {name: value.clone() for name, value in trainer.reversible.trained.items()}
    with pytest.raises(StreamOverflowError, match="model.layers.*reversible_fraction_bits"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.reversible.trained.items())


# -- with token seeking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer, layers", [("random", None), ("context", None), ("gradient", 3), ("combined", 3)])
def test_token_seeking_on_reversible_layers(tmp_path, scorer, layers, caplog):
    settings = CENTRED | SEEKING | {"token_scorer": scorer}
    if scorer == "random":
        settings["context_normalize"] = "sum"
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("ignore", message="context_normalize has no effect")
        ours, theirs = (train(deep(), arguments(tmp_path, **settings), ROWS, cls=cls) for cls in (MemEfficientTrainer, TwinTrainer))
    assert ours.trainer.reversible.config.reversible_layers == layers
    assert ("reversible_layers=3" in caplog.text) == (layers == 3)
    assert ours.losses == theirs.losses and same_parameters(ours, theirs)
    assert ours.trainer.last_selection is not None
    assert not same_parameters(ours, train(deep(), reversible(tmp_path), ROWS))


@pytest.mark.parametrize("layers, given, expected", [(2, None, "too few"), (4, 4, "expected 2 to 3")])
def test_such_scores_need_an_ordinary_last_layer(tmp_path, layers, given, expected):
    settings = CENTRED | SEEKING | {"reversible_layers": given}
    with pytest.raises(ConfigError, match=f"runs the last block alone.*{expected}"):
        trainer_for(deep(num_hidden_layers=layers), arguments(tmp_path, **settings), ROWS)
    trainer_for(deep(num_hidden_layers=4), arguments(tmp_path, **settings | {"reversible_layers": 3}), ROWS)


# -- two levels --------------------------------------------------------------------------------------------------------


TWO = {"checkpoint_levels": 2, "token_seeking": False}


@pytest.mark.parametrize("strategy", [{}, SEEKING, {"sequence_chunk_size": 4}], ids=["alone", "seeking", "streaming"])
def test_two_levels_train_as_none(tmp_path, strategy):
    settings = {"seeking": True, "token_seeking": False} | strategy
    rows = text_rows(16)
    levels, plain = (
        train(deep(dtype=torch.float64), arguments(tmp_path, **settings, checkpoint_levels=n), rows) for n in (2, None)
    )
    assert worst_step(levels, plain) <= tolerance(torch.float64, float32_inside=bool(strategy))
    assert worst_step(levels, train(deep(dtype=torch.float64), arguments(tmp_path, **settings, seed=8), rows)) > NOTICED
    assert levels.trainer.checkpoint_callback.handle is None
    assert not any("forward" in vars(module) for module in levels.trainer.model.model.layers)


def test_two_levels_are_on_in_training_and_off_after_a_failure(tmp_path):
    seen = []

    class Failing(MemEfficientTrainer):
        def training_step(self, model, *args):
            seen.append([("forward" in vars(layer)) for layer in self.model.model.layers])
            raise ValueError

    model = deep()
    with pytest.raises(ValueError):
        train(model, arguments(tmp_path, **TWO), ROWS, cls=Failing)
    assert seen == [[True] * 4] and not any("forward" in vars(layer) for layer in model.model.layers)


# -- what only a trainer can see ---------------------------------------------------------------------------------------


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
    assert "which reversible does not support" in trainer._problems_of_layers(None)[0]


def test_changed_arguments_are_refused(tmp_path):
    trainer = trainer_for(deep(), reversible(tmp_path), ROWS)
    trainer.args.reversible_scale = 0.25
    with pytest.raises(ConfigError, match="Make a new trainer"):
        trainer.train()
