"""The autograd function of two-level checkpointing, in float64."""

import pytest
import torch

from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.two_level import LayerCall, Segment, run_layer
from tests.support.coupling import Block, gradients_of, inputs, stack_of


def checkpointed(blocks, hidden, beside, segment_layers):
    """segment_layers: None for a segment that never ends."""
    for number, block in enumerate(blocks):
        call = LayerCall(block.layer, Arguments((), {"beside": beside}), Parameters([block]))
        hidden, extras = run_layer(call, hidden, begins=bool(segment_layers) and number % segment_layers == 0)
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


@pytest.mark.parametrize("segment_layers", [1, 2, 3, 7])
def test_a_layer_runs_once_more_than_under_checkpointing(segment_layers):
    """Forward, to find the inputs of its segment, and with gradient; the last layer of a segment has no one behind it to find an input for."""
    blocks, (hidden, beside) = stack_of(7, dropout=0.0), inputs()
    runs = []
    for block in blocks:
        block.layer = lambda *args, layer=block.layer, **kwargs: runs.append(layer) or layer(*args, **kwargs)

    def counted():
        runs.clear()
        checkpointed(blocks, hidden, beside, segment_layers).sum().backward()
        return len(runs)

    last_ones = -(-7 // segment_layers)
    assert counted() == 3 * 7 - last_ones
    find = Segment.input_of

    def forgets(segment, index, boundary, tensors):
        found = find(segment, index, boundary, tensors)
        segment.inputs.clear()
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Segment, "input_of", forgets)
        assert (counted() > 3 * 7 - last_ones) is (segment_layers > 2)


def test_gradcheck():
    blocks, (hidden, beside) = stack_of(3, dropout=0.0), inputs()
    parameters = [p for block in blocks for p in block.parameters()]

    def run(hidden, beside, *parameters):
        return checkpointed(blocks, hidden, beside, 2)

    assert torch.autograd.gradcheck(run, (hidden, beside, *parameters))


def segments_of(output):
    """The segment of every layer, from the last to the first."""
    node, found = output.grad_fn, []
    while node is not None:
        found += [node.segment] if hasattr(node, "segment") else []
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return found


def test_no_input_outlives_its_backward():
    blocks, (hidden, beside) = [Block() for _ in range(4)], inputs()
    output = checkpointed(blocks, hidden, beside, 4)
    segment, *same = segments_of(output)
    assert len(same) == 3 and all(each is segment for each in same) and not segment.inputs
    output.sum().backward()
    assert not segment.inputs and hidden.grad is not None


@pytest.mark.parametrize("between, segments", [(lambda x: x, 1), (lambda x: x * 1.5, 2), (lambda x: x.mul_(1.5), 2), (torch.sin, 2)])
def test_a_layer_that_is_given_something_else_begins_a_segment(between, segments):
    blocks, (hidden, beside) = stack_of(4, dropout=0.0), inputs()
    found = []
    for run in (checkpointed, plain):
        state = hidden
        for number, block in enumerate(blocks):
            state = run([block], state if number != 2 else between(state), beside, None)
        found.append(gradients_of(state, blocks, hidden, beside))
        if run is checkpointed:
            assert len({id(segment) for segment in segments_of(state)}) == segments
    assert all(map(torch.equal, *found))
