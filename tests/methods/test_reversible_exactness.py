"""Gradients through reversible layers are those of plain autograd of the same coupled network, on every architecture claimed."""

import re

import pytest
import torch

from hf_memtune import make_reversible
from tests.support.reversible_exactness import FLOAT32_NORMS, assert_equal_steps, both_steps, model_and_batch
from tests.support.reversible_models import (
    CLAIMED,
    COUPLINGS,
    PARALLEL,
    model_of,
    reversible_of,
    settings,
    step,
    widen_norms_and_attention,
)
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE, tolerance
from tests.support.twin import worst_difference

PAIRS = [(name, coupling) for name in CLAIMED for coupling in COUPLINGS if not (coupling == "meft3" and name in PARALLEL)]


def well_conditioned(coupling):
    """Factors at which the float inverse loses little: what is left is the implementation."""
    return {"reversible_scale": 0.5} | ({} if coupling == "centred" else {"reversible_beta": 0.5})


@pytest.mark.parametrize("name, coupling", PAIRS)
def test_float_gradients(name, coupling):
    """In float64 throughout. The factor of meft3 counts twice in each layer."""
    model, batch = model_and_batch(name)
    factors = dict.fromkeys(("reversible_scale", "reversible_beta"), 0.75) if coupling == "meft3" else well_conditioned(coupling)
    handle = reversible_of(widen_norms_and_attention(model), coupling, **factors)
    (loss, found), (twin_loss, expected) = both_steps(model, batch, handle)
    assert abs(loss - twin_loss) <= RELATIVE[torch.float64]
    assert found.keys() == expected.keys() and worst_difference(found, expected) <= RELATIVE[torch.float64]
    assert all(gradient.norm() > 0 for key, gradient in found.items() if "reversible_adapters" in key)


@pytest.mark.parametrize("name", FLOAT32_NORMS)
def test_float_gradients_with_the_norms_as_they_are(name):
    """The last bit of the inverse flips roundings to float32 inside."""
    model, batch = model_and_batch(name)
    handle = reversible_of(model, "centred", reversible_scale=0.5)
    ours, theirs = both_steps(model, batch, handle)
    assert worst_difference(ours[1], theirs[1]) <= FLOAT32_INSIDE


@pytest.mark.parametrize("name, coupling", PAIRS)
def test_exact_gradients_are_equal(name, coupling):
    model, batch = model_and_batch(name)
    handle = reversible_of(model, coupling, "exact")
    assert_equal_steps(*both_steps(model, batch, handle))
    assert handle.verify(batch).is_exact


DEEP = [("bert", torch.float32), ("llama", torch.bfloat16), ("bert", torch.bfloat16)]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_another_scale_is_noticed(coupling):
    model, batch = model_and_batch("bert")
    reversible_of(model, coupling, "exact")
    found = step(model, batch)
    other = model_of("bert", dropout=0.1)
    reversible_of(other, coupling, "exact", reversible_scale=0.25, **({} if coupling == "centred" else {"reversible_beta": 0.5}))
    assert worst_difference(step(other, batch)[1], found[1]) > NOTICED


@pytest.mark.parametrize("name, dtype, depth", [(name, dtype, depth) for name, dtype in DEEP for depth in (4, 32)])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_exact_gradients_are_equal_at_every_depth(coupling, name, dtype, depth):
    model, batch = model_and_batch(name, dtype=dtype, num_hidden_layers=depth)
    handle = reversible_of(model, coupling, "exact", adapter_init_std=0.05, reversible_fraction_bits=12)
    assert_equal_steps(*both_steps(model, batch, handle))


def test_float_gradients_of_a_deep_model_are_wrong():
    """The sibling of the test above, and what the warning is about."""
    model, batch = model_and_batch("bert", dtype=torch.float32, num_hidden_layers=12)
    with pytest.warns(UserWarning, match="after 12 layers .* off by about 1e\\+05"):
        handle = make_reversible(model, settings("meft1"))
    ours, theirs = both_steps(model, batch, handle)
    assert not worst_difference(ours[1], theirs[1]) < 0.1
    assert not handle.verify(batch).is_exact


@pytest.mark.parametrize(
    "coupling, dtype, said",
    [
        ("centred", torch.float64, "9e-13 of their size (float64 streams, 53 bits)"),
        ("meft1", torch.float32, "1e-04 of their size (float32 streams, 24 bits)"),
        ("meft3", torch.float32, "1e-01 of their size (float32 streams, 24 bits)"),  # 0.1 twice a layer
        ("meft1", torch.bfloat16, "24 bits; up to 8e+00 where a rounding to the 8 bits of bfloat16 flips"),
    ],
)
def test_the_warning_counts_depth_factors_and_mantissa(coupling, dtype, said):
    with pytest.warns(UserWarning, match=re.escape(said)):
        make_reversible(model_of("bert", dtype=dtype), settings(coupling))


@pytest.mark.parametrize("name", [name for name in CLAIMED if name not in PARALLEL])
def test_the_halves_make_the_layer(name):
    """Attention block, then MLP: the factorisation of MEFT3, on the arguments that the model itself gives to its layers."""
    model, batch = model_and_batch(name, dropout=0.0)
    handle = reversible_of(model, "meft3")
    worst, calls = [], []

    def compare(ours):
        def forward(hidden, *args, **kwargs):
            whole, beside = ours._whole(hidden, *args, **kwargs)
            middle, _ = ours._attention(hidden, *args, **kwargs)
            halves, _ = ours._mlp(middle, *args, **kwargs)
            worst.append(((halves - whole).norm() / whole.norm()).item())
            calls.append((middle - whole).norm() / whole.norm())
            return whole if beside is None else (whole, *beside)

        return forward

    for stack in handle.stacks:
        for layer in stack.layers:
            layer.forward = compare(layer.forward.__self__)
    with torch.no_grad():
        model(**batch)
    assert len(worst) == sum(len(stack.layers) for stack in handle.stacks)
    assert max(worst) <= tolerance(torch.float64, name in FLOAT32_NORMS) and min(calls) > NOTICED
