"""The couplings, their arithmetic, and backward through a stack of them, against plain autograd of the same two streams."""

import math
from functools import partial

import pytest
import torch

from hf_memtune.core.coupling import FloatArithmetic, centred, expected_error, meft1, meft2, meft3
from hf_memtune.core.fixed_point import FixedPointArithmetic, pack, stored_bits, unpack
from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.reversible import EnterStreams, LayerRun, LeaveStreams, Tape, run_layer
from hf_memtune.errors import InverseError, StreamOverflowError
from tests.support.coupling import SHAPE, gradients_of, inputs, stack_of
from tests.support.stream_twin import TwinStack
from tests.support.tolerances import NOTICED, RELATIVE

COUPLINGS = {
    "centred": partial(centred, 0.25, True),
    "centred-pre-norm": partial(centred, 0.25, False),
    "meft1": partial(meft1, 0.25, 1.0),
    "meft2": partial(meft2, 1.0, 0.25),
    "meft3": partial(meft3, 0.25, 0.25),
}
WEIGHTS = {"newest": (1.0, 0.0), "mean": (0.5, 0.5), "sum": (1.0, 0.25)}


def reversible(blocks, coupling, arithmetic, hidden, beside, weights=(1.0, 0.0), tape=None):
    tape = tape or Tape(arithmetic)
    newest, older = EnterStreams.apply(hidden, tape)
    for position, block in enumerate(blocks):
        run = LayerRun(coupling, block.functions(), tape, position, Arguments((beside,), {}), Parameters([block]), hidden.device)
        newest, older, _ = run_layer(run, newest, older)
    return LeaveStreams.apply(newest, older, tape, weights)


def both(name, depth=3, dtype=torch.float64, fraction_bits=None, weights=(1.0, 0.0), twin_coupling=None, dropout=0.1):
    """Output and gradients of the reversible stack, and those of its twin."""
    blocks, (hidden, beside) = stack_of(depth, dtype, dropout), inputs(dtype)
    found = []
    for run in (reversible, TwinStack()):
        arithmetic = FloatArithmetic(dtype) if fraction_bits is None else FixedPointArithmetic(dtype, fraction_bits)
        torch.manual_seed(5)
        chosen = twin_coupling if twin_coupling and run is not reversible else COUPLINGS[name]
        output = run(blocks, chosen(), arithmetic, hidden, beside, weights)
        found.append([output.detach(), *gradients_of(output, blocks, hidden, beside)])
    return found


def difference(found, expected):
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(found, expected))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", COUPLINGS)
def test_gradients_are_those_of_plain_autograd(name, weights):
    found, expected = both(name, weights=WEIGHTS[weights])
    assert difference(found, expected) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("name", COUPLINGS)
def test_another_scale_is_noticed(name):
    other = partial(COUPLINGS[name].func, *(0.2 if x == 0.25 else x for x in COUPLINGS[name].args))
    assert difference(*both(name, twin_coupling=other)) > NOTICED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", COUPLINGS)
def test_exact_gradients_are_equal(name, dtype):
    found, expected = both(name, depth=12, dtype=dtype, fraction_bits=20)
    assert all(map(torch.equal, found, expected))


def test_float_gradients_of_a_deep_stack_are_wrong():
    """Which is why the exact arithmetic is there, and the sibling of the test above."""
    found, expected = both("meft1", depth=12, dtype=torch.float32)
    assert difference(found[1:], expected[1:]) > NOTICED
    assert expected_error(12, 0.25, 1.0) > 1


@pytest.mark.parametrize("fraction_bits", [None, 24])
@pytest.mark.parametrize("name", COUPLINGS)
def test_the_input_comes_back(name, fraction_bits):
    blocks, (hidden, beside) = stack_of(4), inputs()
    arithmetic = FloatArithmetic(torch.float64) if fraction_bits is None else FixedPointArithmetic(torch.float64, fraction_bits)
    tape = Tape(arithmetic, compares=True)
    output = reversible(blocks, COUPLINGS[name](), arithmetic, hidden, beside, tape=tape)
    assert tape.streams is None
    gradients_of(output, blocks, hidden)
    assert tape.position == 0
    assert tape.start_error() == 0 if fraction_bits else 0 < tape.start_error() < 1e-10


@pytest.mark.parametrize("name", COUPLINGS)
def test_gradcheck(name):
    blocks, (hidden, beside) = stack_of(2, dropout=0.0), inputs()
    parameters = [p for block in blocks for p in block.parameters()]

    def run(hidden, beside, *parameters):
        return reversible(blocks, COUPLINGS[name](), FloatArithmetic(torch.float64), hidden, beside, WEIGHTS["mean"])

    assert torch.autograd.gradcheck(run, (hidden, beside, *parameters))


def test_no_gradient_mode_gives_the_same_values():
    blocks, (hidden, beside) = stack_of(3, dropout=0.0), inputs()
    outputs = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            outputs.append(reversible(blocks, COUPLINGS["meft1"](), FixedPointArithmetic(torch.float64, 20), hidden, beside))
    assert torch.equal(*outputs) and outputs[0].requires_grad and not outputs[1].requires_grad


def test_two_forwards_before_one_backward_and_a_graph_that_is_kept():
    blocks, (hidden, beside) = stack_of(3, dropout=0.0), inputs()
    one = partial(reversible, blocks, COUPLINGS["centred"](), FixedPointArithmetic(torch.float64, 20))
    single = gradients_of(one(hidden, beside), blocks, hidden)
    torch.manual_seed(7)
    weights = torch.randn(SHAPE, dtype=torch.float64)
    first, second = one(hidden, beside), one(hidden, beside)
    loss = (first * weights).sum() + (second * weights).sum()
    for _ in range(2):
        found = torch.autograd.grad(loss, [hidden], retain_graph=True)[0]
        assert torch.equal(found, 2 * single[0])


def test_a_changed_parameter_is_refused():
    blocks, (hidden, beside) = stack_of(2), inputs()
    output = reversible(blocks, COUPLINGS["centred"](), FloatArithmetic(torch.float64), hidden, beside)
    with torch.no_grad():
        blocks[0].one.weight.mul_(2)
    with pytest.raises(InverseError, match="changed in place"):
        output.sum().backward()


def test_a_changed_output_is_refused():
    blocks, (hidden, beside) = stack_of(2), inputs()
    output = reversible(blocks, COUPLINGS["centred"](), FloatArithmetic(torch.float64), hidden, beside)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("count", [1, 8, 37])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_kept(bits, count):
    stream = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)
    packed = pack(stream, bits)
    assert packed.numel() == bits * math.ceil(count / 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, stream.shape), stream & (2**bits - 1))
    assert not torch.equal(unpack(packed, bits, stream.shape), (stream + 1) & (2**bits - 1))


@pytest.mark.parametrize("scale, bits", [(1.0, 0), (0.5, 1), (0.125, 3), (1 / 256, 8)])
def test_a_power_of_two_has_its_bits(scale, bits):
    assert stored_bits(scale) == bits


@pytest.mark.parametrize("scale", [0.1, 2.0, 1 / 512, 0.0, -0.5])
def test_another_scale_has_none(scale):
    with pytest.raises(ValueError, match="power of two"):
        stored_bits(scale)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.125, 1 / 256])
def test_one_step_reverses_bit_by_bit(scale):
    arithmetic = FixedPointArithmetic(torch.float32, 16)
    stream, update = arithmetic.enter(100 * torch.randn(1000)), 100 * torch.randn(1000)
    blended, lost = arithmetic.blend(stream, scale, update)
    assert torch.equal(arithmetic.unblend(blended, lost, scale, update), stream)
    nearby = arithmetic.unblend(blended, lost, scale, update + 1e-4)
    assert not torch.equal(nearby, stream)
    assert (arithmetic.value(blended) - (scale * arithmetic.value(stream) + update)).abs().max() < 2**-14


@pytest.mark.parametrize("value, place", [(40000.0, "layer 1"), (float("nan"), "layer 1"), (float("inf"), "layer 1")])
def test_overflow_names_the_layer_and_the_remedy(value, place):
    arithmetic = FixedPointArithmetic(torch.float32, 16)
    stream = arithmetic.enter(torch.ones(8))
    for update in (1.0, value):
        stream, _ = arithmetic.blend(stream, 0.5, torch.full((8,), update))
    with pytest.raises(StreamOverflowError, match=place) as raised:
        arithmetic.check(1, ["layer 0", "layer 1"])
    if value == 40000.0:
        assert "reversible_fraction_bits to 14 or less" in str(raised.value)


def test_head_room_is_told():
    arithmetic = FixedPointArithmetic(torch.float32, 16)
    arithmetic.enter(torch.full((8,), 4.0))
    assert arithmetic.check() == 31 - 18
