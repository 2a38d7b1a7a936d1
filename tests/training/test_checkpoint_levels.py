"""Two-level checkpointing under the trainer: the steps of plain training, and nothing left behind."""

import pytest
import torch
from transformers import Trainer

from hf_memtune import CheckpointCallback, ConfigError, MemEfficientTrainer
from tests.support.reversible_runs import ROWS, deep, quiet  # noqa: F401  a fixture for all
from tests.support.runs import SEEKING, arguments, text_rows, train, worst_step
from tests.support.tolerances import NOTICED, tolerance

TWO = {"checkpoint_levels": 2, "token_seeking": False}


@pytest.mark.parametrize("strategy", [{}, SEEKING, {"sequence_chunk_size": 4}], ids=["alone", "seeking", "streaming"])
def test_two_levels_train_as_none(tmp_path, strategy):
    settings = {"seeking": True, "token_seeking": False} | strategy
    rows = text_rows(16)
    levels, plain = (train(deep(dtype=torch.float64), arguments(tmp_path, **settings, checkpoint_levels=n), rows) for n in (2, None))
    assert worst_step(levels, plain) <= tolerance(torch.float64, float32_inside=bool(strategy))
    assert worst_step(levels, train(deep(dtype=torch.float64), arguments(tmp_path, **settings, seed=8), rows)) > NOTICED
    assert levels.trainer.checkpoint_callback.handle is None
    assert not any("forward" in vars(module) for module in levels.trainer.model.model.layers)


def test_a_plain_trainer_takes_the_callback_and_is_refused_what_it_does_not_support(tmp_path):
    rows = text_rows(16)
    plain, ours = (
        train(deep(), arguments(tmp_path, seeking=False), rows, cls=Trainer, callbacks=callbacks)
        for callbacks in ([], [CheckpointCallback()])
    )
    assert ours.losses == plain.losses
    model = deep()
    with pytest.raises(ConfigError, match="gradient_checkpointing: got True with checkpoint_levels.*set it to False"):
        train(model, arguments(tmp_path, seeking=False, gradient_checkpointing=True), rows, cls=Trainer, callbacks=[CheckpointCallback()])
    assert not any("forward" in vars(layer) for layer in model.model.layers)


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
