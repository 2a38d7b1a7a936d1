"""Trainers that people derive: what they change must show, and what would silently do nothing must not."""

import pytest

from hf_memtune import ConfigError, MemEfficientTrainer, MemTuneError, TokenMapCallback
from tests.training.runs import arguments, llama, text_rows, train, trainer_for

ROWS = text_rows(16)
ORDER = {"train_sampling_strategy": "sequential", "max_steps": 2, "logging_steps": 1}


class Direct(MemEfficientTrainer):
    """The usual way to override a loss, which never reaches token seeking."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Doubled(MemEfficientTrainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs) + 1


class Looking(MemEfficientTrainer):
    seen = "nothing"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._in_step:
            self.seen = outputs.logits
        return (loss, outputs) if return_outputs else loss


def losses(run):
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


def test_a_loss_that_goes_past_token_seeking_is_an_error(tmp_path):
    with pytest.raises(MemTuneError, match="Direct.compute_loss called the model past the strategy that is on"):
        train(llama(), arguments(tmp_path, **ORDER), ROWS, cls=Direct)
    without = arguments(tmp_path, **ORDER)
    without.token_seeking = False
    train(llama(), without, ROWS, cls=Direct)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_a_subclass_adds_to_the_loss_is_reported(tmp_path, accumulation):
    settings = {**ORDER, "learning_rate": 0.0, "gradient_accumulation_steps": accumulation}
    plain = losses(train(llama(), arguments(tmp_path / "a", **settings), ROWS))
    doubled = losses(train(llama(), arguments(tmp_path / "b", **settings), ROWS, cls=Doubled))
    if accumulation == 1:
        assert doubled == pytest.approx([2 * loss + 1 for loss in plain], rel=1e-5)
    else:
        assert all(found > loss + 1 for found, loss in zip(doubled, plain, strict=True))


def test_there_are_no_logits_where_the_loss_was_fused(tmp_path):
    run = train(llama(), arguments(tmp_path, **ORDER), ROWS, cls=Looking)
    assert run.trainer.seen is None


def test_a_name_is_not_a_scorer_function(tmp_path):
    with pytest.raises(ConfigError, match="Names go to args.token_scorer"):
        trainer_for(llama(), arguments(tmp_path), ROWS, token_scorer="random")


def test_impossible_drawings_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="expected 1 or more"):
        TokenMapCallback([], None, arguments(tmp_path), every_n_steps=0)
