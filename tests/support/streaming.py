"""What the tests of streaming share with others."""

from contextlib import contextmanager

import pytest
import torch

from hf_memtune.core import logits, pieces
from hf_memtune.methods.attention import masks
from tests.support.stepping import has_float32_inside, model_and_batch, plain_twin, stream
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, worst_difference

LENGTHS = (12, 9)


def allowed(name, dtype=torch.float64):
    """Some routers are in float32 whatever the model is called in."""
    return tolerance(dtype, has_float32_inside(name) or name in ("deepseek-v3", "afmoe"))


def cut_small(monkeypatch):
    """Let attention to earlier keys go in squares of masks and blocks of pieces as it does in long rows: by a few keys."""
    monkeypatch.setattr(masks, "SQUARE", 2)
    monkeypatch.setattr(masks, "GROUP", 2)
    monkeypatch.setattr(pieces, "BLOCK", 3)


@contextmanager
def values_of_logits(are_made=True):
    """Let losses be taken of the values of logits, as those are that are no cross entropy."""
    with pytest.MonkeyPatch.context() as patch:
        if are_made:
            patch.setattr(logits, "_cross_entropy_on_demand", lambda *args, **kwargs: None)
        yield


def assert_streams(model, batch, chunk, limit, expected=None, made=False, **settings):
    """Loss and all gradients of a stream equal those of plain backpropagation, or others that are expected. made: of logits' values."""
    loss, wanted = expected or plain_twin(model, batch)
    with values_of_logits(made):
        found = stream(model, batch, chunk, **settings)
    assert found.gradients.keys() == wanted.keys()
    assert worst_difference(found.gradients, wanted) <= limit
    assert abs(found.loss - loss) <= limit * max(1.0, abs(loss))
    return found


def assert_embeddings_learn(name, chunk, **settings):
    """Given in place of ids: their gradient, and all others, are those of plain backpropagation."""
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    expected = plain_twin(model, batch)
    plain, batch["inputs_embeds"].grad = batch["inputs_embeds"].grad, None
    assert_streams(model, batch, chunk, allowed(name, dtype), expected, **settings)
    assert worst_difference({"embeds": batch["inputs_embeds"].grad}, {"embeds": plain}) <= allowed(name, dtype)
    assert worst_difference({"embeds": batch["inputs_embeds"].grad.roll(1, 1)}, {"embeds": plain}) > NOTICED


def own_loss(model, batch):
    """The model's own loss of a plain forward, and its gradients."""
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


def are_made(found) -> bool:
    return found._memory.values is not None
