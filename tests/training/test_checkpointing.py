"""Activation checkpointing, mixed precision and adapters, under the Trainer."""

import warnings

import pytest
import torch
from transformers import Trainer

from hf_memtune import MemEfficientTrainer, SavedBytes
from hf_memtune.methods.streaming.layer_stream import LayerStream
from tests.support.checkpointing import adapted, worst_difference_of_all
from tests.support.runs import arguments, llama, text_rows, train, worst_step
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, RELATIVE
from tests.support.twin import worst_difference

ROWS = text_rows(8, shortest=40, longest=48)
SPELLINGS = ["activation_checkpointing", "gradient_checkpointing"]


class Measuring(MemEfficientTrainer):
    """Counts what is saved for backward in each step."""

    def compute_loss(self, model, *args, **kwargs):
        with SavedBytes(exclude=model) as saved:
            result = super().compute_loss(model, *args, **kwargs)
        self.saved_bytes = saved.total_bytes
        return result


def run(tmp_path, make_model=llama, cls=Measuring, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old spelling
        return train(make_model(), arguments(tmp_path, **settings), ROWS, cls=cls)


@pytest.mark.parametrize("make_model", [llama, adapted])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_save_bytes_and_change_nothing(tmp_path, spelling, make_model):
    plain = run(tmp_path, make_model)
    checkpointed = run(tmp_path, make_model, **{spelling: True})
    assert worst_step(checkpointed, plain) <= RELATIVE[torch.float32]
    assert checkpointed.losses == pytest.approx(plain.losses, rel=RELATIVE[torch.float32])
    assert checkpointed.trainer.saved_bytes < 0.7 * plain.trainer.saved_bytes


def test_a_trainer_that_checkpoints_streams_by_layers(tmp_path, monkeypatch):
    """Checkpointing is on before the callback looks at the layers."""
    taken, forward = [], LayerStream.run_forward

    def noting(self, records):
        taken.append(self.means.router.architecture.base.training)  # not so in the probe before
        return forward(self, records)

    monkeypatch.setattr(LayerStream, "run_forward", noting)
    by_chunks = run(tmp_path, token_seeking=False, sequence_chunk_size=16)
    assert not any(taken)
    by_layers = run(tmp_path, token_seeking=False, sequence_chunk_size=16, activation_checkpointing=True)
    assert any(taken) and worst_step(by_layers, by_chunks) <= RELATIVE[torch.float32]


def test_ditching_saves_bytes_without_checkpointing_too(tmp_path):
    """Chosen at random, for scoring saves something for the last block too, if only until the choice is made."""
    random = {"token_scorer": "random", "context_normalize": "sum"}
    few, many = (run(tmp_path, token_ratio=ratio, **random).trainer.saved_bytes for ratio in (0.1, 1.0))
    assert few < 0.2 * many


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("make_model", [llama, adapted])
def test_mixed_precision_is_near_to_full(tmp_path, settings, make_model):
    half, full = (run(tmp_path, make_model, bf16=bf16, max_steps=1, **settings) for bf16 in (True, False))
    assert worst_difference_of_all(half.gradients[0], full.gradients[0]) <= RELATIVE[torch.bfloat16]
    assert half.losses == pytest.approx(full.losses, rel=1e-2) and half.losses != full.losses
    assert all(gradient.dtype == torch.float32 for gradient in half.gradients[0].values())


@pytest.mark.parametrize("bf16", [False, True])
def test_every_token_of_an_adapted_model_is_plain_training(tmp_path, bf16):
    settings = {"bf16": bf16, "max_steps": 1}
    ours = run(tmp_path, adapted, token_ratio=1.0, **settings)
    plain = train(adapted(), arguments(tmp_path, seeking=False, **settings), ROWS, cls=Trainer)
    if bf16:
        assert worst_difference_of_all(ours.gradients[0], plain.gradients[0]) <= RELATIVE[torch.bfloat16]
    else:
        assert worst_step(ours, plain) <= RELATIVE[torch.float32]
    assert {name.rpartition(".lora_")[1] for name in ours.gradients[0]} == {".lora_"}  # the base model is frozen


def test_bfloat16_weights_train(tmp_path):
    finished = run(tmp_path, lambda: llama(torch.bfloat16), max_steps=3, learning_rate=0.5)
    assert finished.losses[-1] < finished.losses[0]


def test_float64_checkpointing_is_exact(tmp_path):
    def model():
        return tiny_model("gpt2", dtype=torch.float64)

    plain, checkpointed = run(tmp_path, model), run(tmp_path, model, activation_checkpointing=True)
    for pair in zip(checkpointed.gradients, plain.gradients):
        assert worst_difference(*pair) <= RELATIVE[torch.float64] < FLOAT32_INSIDE
