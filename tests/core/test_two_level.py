"""The autograd function of two-level checkpointing, in float64."""

import pytest
import torch

from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.two_level import LayerCall, Passing, Segment, run_layer
from tests.support.coupling import Block, gradients_of, inputs, stack_of


def checkpointed(blocks, hidden, beside, segment_layers):
    for number, block in enumerate(blocks):
        if number % segment_layers == 0:
            passing = Passing(Segment(), hidden)
        call = LayerCall(block.layer, Arguments((), {"beside": beside}), Parameters([block]))
        hidden, passing, extras = run_layer(call, passing, hidden)
        assert extras is None
    return hidden


def plain(blocks, hidden, beside, segment_layers):
    for block in blocks:
        hidden = block.layer(hidden, beside.view_as(beside))[0]
    return hidden


@pytest.mark.parametrize("segment_layers", [1, 2, 3, 7])
def test_gradients_are_equal(segment_layers):
    blocks, (hidden, beside) = stack_of(7), inputs()
    found = []
    for run in (checkpointed, plain):
        torch.manual_seed(5)
        found.append(gradients_of(run(blocks, hidden, beside, segment_layers), blocks, hidden, beside))
    assert all(map(torch.equal, *found))
    torch.manual_seed(6)
    other = gradients_of(plain(blocks, hidden, beside, segment_layers), blocks, hidden, beside)
    assert not all(map(torch.equal, found[0], other))


def test_gradcheck():
    blocks, (hidden, beside) = stack_of(3, dropout=0.0), inputs()
    parameters = [p for block in blocks for p in block.parameters()]

    def run(hidden, beside, *parameters):
        return checkpointed(blocks, hidden, beside, 2)

    assert torch.autograd.gradcheck(run, (hidden, beside, *parameters))


def test_no_input_outlives_its_backward():
    blocks, (hidden, beside) = [Block() for _ in range(4)], inputs()
    segment = Segment()
    passing = Passing(segment, hidden)
    state = hidden
    for block in blocks:
        state, passing, _ = run_layer(LayerCall(block.layer, Arguments((beside,), {}), Parameters([block])), passing, state)
    assert not segment.inputs
    state.sum().backward()
    assert not segment.inputs and hidden.grad is not None
