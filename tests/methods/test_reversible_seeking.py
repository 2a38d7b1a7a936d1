"""Token seeking on a model whose layers run twice: reversible ones, or checkpointed on two levels."""

import pytest
import torch

from hf_memtune import LiveBytes, Streaming, StreamingConfig, checkpoint_in_two_levels
from tests.support.reversible_models import inputs_of, model_of, reversible_of, twin
from tests.support.stepping import seek_in_stream, seeking_on, step_on, take_step
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, tolerance
from tests.support.twin import gradients, worst_difference

SCORERS = ["random", "context", "combined"]


def model_and_batch(name, **changed):
    model = model_of(name, **changed)
    return model, {key: value for key, value in inputs_of(name, model).items() if key != "use_cache"}


def seeded_step(model, batch, **settings):
    torch.manual_seed(4)
    return take_step(model, batch, **settings)


def assert_same(found, expected):
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(found.kept[name], kept) for name, kept in expected.kept.items())
    assert found.gradients.keys() == expected.gradients.keys()
    unequal = [name for name in expected.gradients if not torch.equal(found.gradients[name], expected.gradients[name])]
    assert not unequal


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("coupling", ["centred", "meft1", "meft3"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "bart"])
def test_seeking_on_reversible_layers(name, coupling, scorer):
    """The last layer is an ordinary one: scores run it alone."""
    model, batch = model_and_batch(name)
    handle = reversible_of(model, coupling, "exact", reversible_layers=2)
    ours = seeded_step(model, batch, token_scorer=scorer)
    with twin(handle):
        theirs = seeded_step(model, batch, token_scorer=scorer)
    if name == "bart":  # sums over the layers of a decoder, in another order
        assert worst_difference(ours.gradients, theirs.gradients) <= tolerance(torch.float64)
    else:
        assert_same(ours, theirs)
    assert not all(kept.all() for kept in ours.kept.values())


def test_another_ratio_is_noticed():
    model, batch = model_and_batch("llama")
    reversible_of(model, "centred", "exact", reversible_layers=2)
    one, other = (seeded_step(model, batch, token_scorer="random", token_ratio=ratio).gradients for ratio in (0.35, 0.6))
    assert worst_difference(one, other) > NOTICED


@pytest.mark.parametrize("scorer", ["context", "combined"])
@pytest.mark.parametrize("token_gradient", ["cut", "stream", "skip"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_seeking_on_two_levels(name, token_gradient, scorer):
    model, batch = model_and_batch(name)
    settings = {"token_scorer": scorer, "token_gradient": token_gradient}

    def found():
        return seeded_step(model, batch, **settings) if token_gradient == "cut" else seeded_stream(model, batch, **settings)

    plain = found()
    checkpoint_in_two_levels(model)
    if token_gradient == "cut":
        assert_same(found(), plain)
    else:
        assert worst_difference(found().gradients, plain.gradients) <= tolerance(torch.float64, float32_inside=name == "llama")


def seeded_stream(model, batch, **settings):
    torch.manual_seed(4)
    return seek_in_stream(model, batch, 4, **settings)


@pytest.mark.parametrize("coupling", ["centred", "meft3"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_streaming_on_reversible_layers(name, coupling):
    """In chunks, the gradients of the whole rows."""
    model, batch = model_and_batch(name)
    handle = reversible_of(model, coupling, "float", reversible_scale=0.5, **({"reversible_beta": 0.5} if coupling == "meft3" else {}))
    expected = gradients(model, model(**batch).loss)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4), check=False) as streaming:
        found = step_on(model, streaming, batch).gradients
    assert worst_difference(found, expected) <= FLOAT32_INSIDE  # transformers' own loss, to compare with, is in float32
    assert handle.headroom_bits is None


def test_together_they_keep_less_than_either_alone():
    """In the proportions of large models: few heads of keys and values, which seeking stores, and a wide MLP."""
    wide = {"num_key_value_heads": 1, "intermediate_size": 256, "num_hidden_layers": 16}

    def live(reversible, seeking):
        model, _ = model_and_batch("llama", dtype=torch.float32, **wide)
        batch = {"input_ids": torch.randint(5, 60, (2, 64)), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
        batch["labels"] = batch["input_ids"].clone()
        if reversible:
            reversible_of(model, "centred", "exact", reversible_layers=15)
        strategy = seeking_on(model, token_ratio=0.1, token_scorer="random") if seeking else None
        with LiveBytes() as live:
            model(**batch, use_cache=False).loss.backward()
        if strategy is not None:
            strategy.remove()
        return live.peak_bytes

    both, reversible, seeking = live(True, True), live(True, False), live(False, True)
    assert both < min(reversible, seeking)
