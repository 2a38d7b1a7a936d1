"""SavedBytes, in exact bytes, on real and on fake tensors. Shapes: B = 3 rows, float32."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hf_memtune.memory import LiveBytes, SavedBytes, peak_device_bytes, reset_peak_device_bytes, resident_bytes

F32 = 4
X, HIDDEN, WEIGHT_2 = 3 * 4 * F32, 3 * 8 * F32, 8 * 2 * F32


@pytest.fixture(params=[contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"], autouse=True)
def tensors(request):
    with request.param():
        yield


def make_net(activation=None):
    return nn.Sequential(nn.Linear(4, 8), activation or nn.GELU(), nn.Linear(8, 2))


class LeakyGELU(nn.Module):
    """GELU with one needless product, whose two inputs are saved: the leak each count below must notice."""

    def forward(self, x):
        return nn.functional.gelu(x) + 0 * (x.detach().clone().requires_grad_() * x)


class SavesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        kept = x * 1
        ctx.save_for_backward(kept)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class HidesInput(SavesInput):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = x * 1
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.kept


def test_linear_gelu_net_saves_what_the_hand_says():
    net = make_net()
    with SavedBytes(exclude=net) as saved:
        loss = net(torch.randn(3, 4)).sum()
    # x and the GELU's output for the weights' gradients, the GELU's input for its own.
    assert saved.total_bytes == saved.current_bytes == saved.peak_bytes == X + 2 * HIDDEN
    assert [(e.storage_bytes, e.shape, e.dtype) for e in saved.entries] == [
        (HIDDEN, (3, 8), torch.float32),
        (HIDDEN, (3, 8), torch.float32),
        (X, (3, 4), torch.float32),
    ]
    assert [e.op for e in saved.entries] == ["AddmmBackward0", "GeluBackward0", None]
    loss.backward()
    assert saved.current_bytes == 0  # released, after the context was left
    assert saved.total_bytes == saved.peak_bytes == X + 2 * HIDDEN


def test_leaking_twin_saves_more():
    net = make_net(LeakyGELU())
    with SavedBytes(exclude=net) as saved:
        net(torch.randn(3, 4)).sum()
    assert saved.total_bytes == X + 3 * HIDDEN  # the clone; the other factor is the GELU's input, counted already


def test_weights_count_unless_excluded():
    net = make_net()
    with SavedBytes() as saved:
        net(torch.randn(3, 4)).sum()
    assert saved.total_bytes == X + 2 * HIDDEN + WEIGHT_2  # x needs no gradient, so weight 1 is not saved
    with SavedBytes(exclude=[net[0], net[2].weight]) as saved:
        net(torch.randn(3, 4)).sum()
    assert saved.total_bytes == X + 2 * HIDDEN


def test_exclude_of_something_else_is_refused():
    with pytest.raises(TypeError, match="got int"), SavedBytes(exclude=[3]):
        pass


def test_frozen_weights_and_no_grad_save_nothing():
    net = make_net().requires_grad_(False)
    with SavedBytes() as saved:
        net(torch.randn(3, 4)).sum()
        with torch.no_grad():
            make_net()(torch.randn(3, 4))
    assert saved.total_bytes == 0 and saved.entries == []


def test_a_view_is_charged_with_its_storage_and_once():
    x = torch.randn(10, 4, requires_grad=True)
    with SavedBytes(exclude=x) as saved:
        base = x * 2
        loss = base[:1].exp().sum() + base[:1].sin().sum() + base[1:2].cos().sum()
    views = [e for e in saved.entries if e.storage_bytes == 10 * 4 * F32]
    assert len(views) == 1 and views[0].shape == (1, 4)
    assert saved.total_bytes == 10 * 4 * F32 + 1 * 4 * F32  # base, and exp's own output
    del loss


def test_saved_output_makes_no_cycle():
    gc.collect()
    gc.disable()
    try:
        with SavedBytes() as saved:
            y = torch.randn(4, requires_grad=True).exp()
        assert saved.current_bytes == 4 * F32
        del y
        assert saved.current_bytes == 0  # without any help from the garbage collector
    finally:
        gc.enable()


def test_gradients_are_those_without_the_ledger():
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    net = make_net()
    (plain,) = torch.autograd.grad(net(x).relu_().exp().sum(), x)
    with SavedBytes():
        loss = net(x).relu_().exp().sum()
    (seen,) = torch.autograd.grad(loss, x)
    assert seen.shape == plain.shape
    if type(plain) is torch.Tensor:
        assert torch.equal(seen, plain)


def test_in_place_change_of_a_saved_tensor_still_raises():
    x = torch.ones(3, requires_grad=True)
    with SavedBytes():
        y = x * 2
        z = y * y
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        z.sum().backward()


@pytest.mark.parametrize(("function", "seen"), [(SavesInput, 1), (HidesInput, 0)])
def test_a_ctx_attribute_escapes_but_not_from_live_bytes(function, seen):
    x = torch.randn(8, requires_grad=True)
    with LiveBytes() as live, SavedBytes(exclude=x) as saved:
        y = function.apply(x)
    assert saved.total_bytes == seen * 8 * F32
    assert live.current_bytes == 2 * 8 * F32  # the kept tensor and y
    del y


def test_checkpointed_net_saves_its_input_only():
    net = make_net()
    x = torch.randn(3, 4)
    with SavedBytes(exclude=net) as saved:
        loss = checkpoint(net, x, use_reentrant=False).sum()
        assert saved.total_bytes == X
        loss.backward()  # what it recomputes belongs to the checkpoint's own hooks
    assert saved.total_bytes == X and saved.current_bytes == 0


def test_checkpoint_keyword_arguments_escape():
    x = torch.randn(3, 4, requires_grad=True)
    scale = torch.randn(3, 4)
    with SavedBytes() as saved:
        checkpoint(lambda x, scale: x * scale, x, scale=scale, use_reentrant=False)
    assert saved.total_bytes == X


def test_reentrant_checkpoint_counts_its_recomputation():
    net = make_net()
    x = torch.randn(3, 4, requires_grad=True)
    with SavedBytes(exclude=net) as saved:
        loss = checkpoint(net, x, use_reentrant=True).sum()
        assert saved.total_bytes == X
        loss.backward()
    assert saved.total_bytes == X + 2 * HIDDEN  # detached inside: the same storage of x
    assert saved.peak_bytes == X + 2 * HIDDEN


def test_peak_is_of_what_is_held_at_once():
    x = torch.randn(8, requires_grad=True)
    with SavedBytes(exclude=x) as saved:
        for _ in range(3):
            x.exp().sum().backward()
    assert saved.total_bytes == 3 * 8 * F32
    assert saved.peak_bytes == 8 * F32


def test_nested_ledgers_both_count():
    x = torch.randn(8, requires_grad=True)
    with SavedBytes(exclude=x) as outer:
        a = x.exp()
        with SavedBytes(exclude=x) as inner:
            b = a.exp()
        assert inner.total_bytes == 8 * F32
        b.exp()
    assert outer.total_bytes == 3 * 8 * F32
    assert inner.total_bytes == 8 * F32


def test_the_ledger_does_not_keep_storages_alive_and_cannot_be_opened_twice():
    net = make_net()
    with LiveBytes() as live, SavedBytes(exclude=net) as saved:
        net(torch.randn(3, 4)).sum()
        assert live.current_bytes == 0
        with pytest.raises(RuntimeError, match="open already"), saved:
            pass


def test_device_peak_is_none_where_nothing_counts():
    reset_peak_device_bytes("cpu")
    assert peak_device_bytes("cpu") is None
    assert peak_device_bytes(torch.device("meta")) is None


def test_resident_bytes_sees_an_allocation():
    before = resident_bytes()
    ballast = bytearray(b"\1") * (64 << 20)
    assert resident_bytes() - before >= 48 << 20
    del ballast
