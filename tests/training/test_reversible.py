"""Reversible layers under the trainer: exact steps, what is trained, and the first batch."""

import logging

import pytest
import torch
from transformers import Trainer

from hf_memtune import (
    ConfigError,
    InverseError,
    MemEfficientTrainer,
    MemTuneError,
    ReversibleCallback,
    ReversibleConfig,
    StreamOverflowError,
    make_reversible,
)
from tests.support.reversible_runs import (
    ADAPTERS,
    CENTRED,
    ROWS,
    TwinTrainer,
    Unseen,
    adapted,
    deep,
    quiet,  # noqa: F401  a fixture for all
    reversible,
)
from tests.support.runs import arguments, pad_right, same_parameters, text_rows, train, trainer_for

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


def test_arguments_that_the_layers_do_not_support_are_refused_under_any_trainer(tmp_path):
    """Before a layer changes; also where layers that are reversible already are given, of which the arguments know nothing."""
    model, callback = deep(), ReversibleCallback(ReversibleConfig(reversible="centred", **ADAPTERS))
    args = arguments(tmp_path, seeking=False, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing: got True with reversible.*set it to False"):
        train(model, args, ROWS, cls=Trainer, callbacks=[callback])
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    handle = make_reversible(model, ReversibleConfig(reversible="centred", **ADAPTERS))
    given = arguments(tmp_path, token_seeking=False, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing: got True with reversible"):
        trainer_for(model, given, ROWS, reversible=handle)


def test_a_plain_trainer_that_makes_another_model_is_refused(tmp_path):
    """Its layers are not reversible, and without adapters nothing of it is frozen."""
    callback = ReversibleCallback(ReversibleConfig(reversible="centred", **ADAPTERS))
    args = arguments(tmp_path, seeking=False)
    trainer = Trainer(model_init=lambda: deep(), args=args, train_dataset=ROWS, data_collator=pad_right, callbacks=[callback])
    with pytest.raises(ConfigError, match="model_init.*Pass a model"):
        trainer.train()


@pytest.mark.parametrize("cls", [Trainer, MemEfficientTrainer])
def test_an_optimizer_without_the_adapters_is_refused(tmp_path, cls):
    """It would step none of what is trained. One that was made after them has them."""

    def begin(model, parameters, **layers):
        optimizers = torch.optim.SGD(parameters, lr=0.1), None
        given = {"callbacks": [ReversibleCallback(**layers)]} if cls is Trainer else {"reversible": layers["handle"]}
        args = arguments(tmp_path, seeking=False) if cls is Trainer else arguments(tmp_path, token_seeking=False)
        return train(model, args, ROWS, cls=cls, optimizers=optimizers, **given)

    config = ReversibleConfig(reversible="centred", **ADAPTERS)
    if cls is Trainer:
        model = deep()
        with pytest.raises(ConfigError, match="optimizers: got one .* before the reversible layers"):
            begin(model, model.parameters(), config=config)
        assert not any("forward" in vars(layer) for layer in model.model.layers)
    model = deep()
    before = list(model.parameters())
    handle = make_reversible(model, config)
    with pytest.raises(ConfigError, match="optimizers: got one .* before the reversible layers"):
        begin(model, before, handle=handle)
    adapters = {name: value.clone() for name, value in handle.adapters.items()}
    begin(model, [p for p in model.parameters() if p.requires_grad], handle=handle)
    assert not any(torch.equal(value, adapters[name]) for name, value in handle.adapters.items())


def test_a_callback_that_came_too_late_or_is_of_another_trainer_is_refused(tmp_path):
    config = ReversibleConfig(reversible="centred", **ADAPTERS)
    late = trainer_for(deep(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer)
    late.add_callback(callback := ReversibleCallback(config))
    with pytest.raises(MemTuneError, match="was added to a trainer that was made before"):
        late.train()
    for _ in range(2):
        trainer = trainer_for(deep(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer, callbacks=[callback])
    with pytest.raises(ConfigError, match="that of another trainer: give each trainer a callback of its own"):
        trainer.train()


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
