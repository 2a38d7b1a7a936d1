"""Llama 4 scales queries by their positions, which it counts from the first token it is given: here, from the first of the row."""

import copy

import pytest
import torch

from hf_memtune.methods.attention import routing
from tests.support.scores import column_sums, scores_seen
from tests.support.stepping import (
    assert_equal_step,
    has_float32_inside,
    model_and_batch,
    plain_twin,
    seek_in_stream,
    stream,
    take_step,
    token_twin,
)
from tests.support.tolerances import NOTICED, RELATIVE, tolerance
from tests.support.twin import worst_difference

LENGTHS = (24, 19)
LLAMA4 = {"no_rope_layers": [0, 1, 0], "layer_types": ["full_attention", "chunked_attention", "full_attention"]}


def scaled(floor=16, side="right", **settings):
    """The scale changes at token 15, within a chunk, and at token 31."""
    settings = {"floor_scale": floor, "attn_scale": 0.1, "attn_temperature_tuning": True, "lengths": LENGTHS, **LLAMA4, **settings}
    return model_and_batch("llama4", side, **settings)


@pytest.mark.parametrize("floor", [2, 16])
@pytest.mark.parametrize("side, chunk", [("right", 5), ("left", 5), ("right", 1), ("right", 16)])
def test_a_stream_is_plain_training(side, chunk, floor):
    model, batch, dtype = scaled(floor, side)
    found, (loss, expected) = stream(model, batch, chunk), plain_twin(model, batch)
    assert_equal_step(found, loss, expected, dtype, has_float32_inside("llama4"))


def test_positions_that_begin_in_every_chunk_are_noticed(monkeypatch):
    monkeypatch.setattr(routing, "at_temperature", lambda module, query, span: query)
    model, batch, _ = scaled()
    assert worst_difference(stream(model, batch, 5).gradients, plain_twin(model, batch)[1]) > NOTICED


@pytest.mark.parametrize("chunk", [5, 512])
def test_token_seeking_equals_its_twin(chunk):
    """Kept tokens are far apart."""
    model, batch, dtype = scaled(2)
    taken = take_step(model, batch, context_chunk_size=chunk)
    loss, expected = token_twin(model, batch, taken.kept, "causal_lm")
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside("llama4"))


@pytest.mark.parametrize("chunk", [5, 512])
def test_scores_are_those_of_the_models_own_attention(chunk):
    model, batch, _ = scaled(2)
    real = batch["attention_mask"].bool()
    eager = copy.deepcopy(model).eval()
    eager.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    expected = column_sums(attentions[-1], real)[real]
    found = scores_seen(model, batch, "context_score", context_chunk_size=chunk)["decoder"]["context_score"][real]
    assert ((found - expected).norm() / expected.norm()).item() <= tolerance(torch.float64, float32_inside=True)
    assert ((column_sums(attentions[0], real)[real] - expected).norm() / expected.norm()).item() > NOTICED  # of another layer


@pytest.mark.parametrize("token_gradient", ["stream", "skip"])
def test_token_seeking_in_a_stream(token_gradient):
    model, batch, dtype = scaled(2)
    taken = seek_in_stream(model, batch, 5, token_gradient=token_gradient, **({"skip_threshold": 0.0} if token_gradient == "skip" else {}))
    loss, expected = plain_twin(model, batch, taken.kept["decoder"])
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside("llama4"))


def test_half_precision_is_as_near_as_plain_training():
    model, batch, _ = scaled(2, dtype=torch.bfloat16)
    _, plain = plain_twin(model, batch)
    _, expected = plain_twin(model.double(), batch)
    found = stream(model.bfloat16(), batch, 5).gradients
    error = lambda g: sum((g[n].double() - e).square().sum() for n, e in expected.items()).sqrt()  # noqa: E731
    size = sum(e.square().sum() for e in expected.values()).sqrt()
    assert error(found) <= 1.5 * error(plain) and error(found) <= RELATIVE[torch.bfloat16] * size
