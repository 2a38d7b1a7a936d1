"""The bottleneck adapter, against the same written out."""

import pytest
import torch
import torch.nn.functional as F

from hf_memtune.core.adapter import Adapter
from tests.support.tolerances import close

ACTIVATIONS = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}


def adapter_of(activation, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    made = Adapter(6, 3, activation, dropout, 0.5, torch.device("cpu"), dtype)
    with torch.no_grad():
        for linear in (made.down, made.up):
            linear.bias.normal_()
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_a_bottleneck_without_a_residual(activation):
    adapter, x = adapter_of(activation), torch.randn(2, 5, 6, dtype=torch.float64)

    def by_hand(act):
        return F.linear(act(x @ adapter.down.weight.T + adapter.down.bias), adapter.up.weight, adapter.up.bias)

    torch.testing.assert_close(adapter(x), by_hand(ACTIVATIONS[activation]), **close(torch.float64))
    for other in ACTIVATIONS.keys() - {activation}:
        assert not torch.allclose(adapter(x), by_hand(ACTIVATIONS[other]), atol=1e-3)


def test_dropout_falls_between_activation_and_up_and_on_training_alone():
    adapter, x = adapter_of("relu", dropout=0.5), torch.randn(2, 5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    found = adapter.train()(x)
    torch.manual_seed(1)
    dropped = torch.dropout(torch.relu(adapter.down(x)), 0.5, train=True)
    assert torch.equal(found, adapter.up(dropped)) and not torch.equal(adapter(x), found)
    assert torch.equal(adapter.eval()(x), adapter_of("relu")(x))


def test_half_precision_goes_through_float32_weights_and_comes_back():
    adapter, x = adapter_of("gelu", dtype=torch.float32), torch.randn(2, 5, 6, dtype=torch.bfloat16)
    assert adapter(x).dtype == torch.bfloat16 and torch.equal(adapter(x), adapter(x.float()).bfloat16())


def test_weights_are_as_wide_as_asked_and_biases_zero():
    made = Adapter(64, 64, "relu", 0.0, 0.02, torch.device("cpu"), torch.float32)
    for linear in (made.down, made.up):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()
