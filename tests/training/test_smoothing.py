"""Label smoothing under a method: the loss and the gradient of transformers' own smoother, without the logits."""

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from hf_memtune import LiveBytes, Streaming, StreamingConfig
from hf_memtune.core import loss
from hf_memtune.core.logits import LazyLogits
from hf_memtune.training.smoothing import LabelSmootherOnDemand
from tests.support.stepping import model_and_batch
from tests.support.tolerances import NOTICED, RELATIVE
from tests.support.twin import gradients, worst_difference

EXACT = RELATIVE[torch.float64]


def smoothed(model, batch, smoother, **count):
    """Loss and gradients, from logits of a call without labels, as transformers takes them."""
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    total = smoother(outputs, batch["labels"], shift_labels=True, **count)
    return total.detach(), gradients(model, total), outputs.logits


@pytest.mark.parametrize("count", [{}, {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(7)}], ids=str)
def test_it_is_the_loss_of_transformers(count):
    model, batch, _ = model_and_batch("gpt2")
    wanted, expected, _ = smoothed(model, batch, LabelSmoother(epsilon=0.2), **count)
    _, other, _ = smoothed(model, batch, LabelSmoother(epsilon=0.1), **count)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5)):
        found, gradient, logits = smoothed(model, batch, LabelSmootherOnDemand(0.2), **count)
    assert isinstance(logits, LazyLogits)
    # transformers sums the smoothed part in float32
    assert abs(found - wanted) <= RELATIVE[torch.float32] * wanted
    assert worst_difference(gradient, expected) <= max(EXACT, 1e-6)
    assert worst_difference(gradient, other) > NOTICED


@pytest.mark.parametrize("smoother, makes_them", [(LabelSmootherOnDemand(0.2), False), (LabelSmoother(0.2), True)])
def test_no_logits_are_made(smoother, makes_them, monkeypatch):
    monkeypatch.setattr(loss, "LOGIT_CHUNK_BYTES", 1)  # 16 tokens of them at a time, the least
    model, batch, _ = model_and_batch("gpt2", lengths=(60, 60))
    whole = 2 * 60 * model.config.vocab_size * 8
    with Streaming(model, StreamingConfig(sequence_chunk_size=20)), LiveBytes(snapshot=True) as live:
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        before = live.current_bytes
        live.reset_peak()
        smoother(outputs, batch["labels"], shift_labels=True)
    assert (live.peak_bytes - before >= 2 * whole) == makes_them
