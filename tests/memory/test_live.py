"""LiveBytes, in exact bytes, on real and on fake tensors."""

import contextlib
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hf_memtune.memory import LiveBytes, SavedBytes

# transformers 5.23 has a new name for gradient_checkpointing_enable; both work.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")

KIB = 1024  # bytes of torch.ones(256)


@pytest.fixture(params=[contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def tensors(request):
    with request.param():
        yield


def test_storage_objects_keep_their_identity(tensors):
    """What both ledgers rest on: one Python object per storage for as long as C++ holds the storage."""
    x = torch.ones(4, requires_grad=True)
    y = x.exp()
    died = []
    watch = weakref.ref(y.untyped_storage(), lambda ref: died.append(True))
    assert watch() is y.untyped_storage() is y.view(2, 2).untyped_storage()
    loss = y.sum()
    del y
    assert watch() is not None and not died  # autograd alone holds it now
    loss.backward()
    assert watch() is None and died == [True]


def sequence(leak=None):
    a = torch.ones(256)
    b = a * 2
    c = b.exp()
    if leak is not None:
        leak.append(b)
    del b
    d = c.view(16, 16).t()
    c.add_(1)
    return a, torch.cat([d, d])


@pytest.mark.parametrize("leaking", [False, True])
def test_peak_of_a_sequence(tensors, leaking):
    kept = []
    with LiveBytes() as live:
        out = sequence(kept if leaking else None)
        assert live.peak_bytes == (5 if leaking else 4) * KIB  # a, c, two for cat; b died before, unless it leaked
        assert live.current_bytes == (4 if leaking else 3) * KIB
    del out
    kept.clear()
    assert live.current_bytes == 0  # deaths are seen after the mode is left
    assert live.peak_bytes == (5 if leaking else 4) * KIB


def test_reset_peak_starts_from_what_is_alive(tensors):
    with LiveBytes() as live:
        a = torch.ones(256)
        a.exp()
        assert live.peak_bytes == 2 * KIB
        live.reset_peak()
        assert live.peak_bytes == live.current_bytes == KIB


def test_the_baseline_counts_only_when_tracked(tensors):
    net = nn.Linear(16, 16)
    x = torch.ones(256)
    with LiveBytes() as live:
        views = [net.weight.t(), x.view(16, 16), torch.ops.aten._unsafe_view(x, [16, 16]), x.mul_(2), *x.split(128)]
        assert live.current_bytes == 0
        live.track(net)
        assert live.current_bytes == 16 * 17 * 4
        live.track([x, views[1], net])
        assert live.current_bytes == 16 * 17 * 4 + KIB
    del views, x, net
    assert live.current_bytes == 0


def test_tracked_modules_bring_their_gradients(tensors):
    net = nn.Linear(16, 16)
    net(torch.ones(16)).sum().backward()
    live = LiveBytes()
    live.track(net)
    assert live.current_bytes == live.peak_bytes == 2 * 16 * 17 * 4
    with pytest.raises(TypeError, match="got int"):
        live.track(3)


def test_torch_tensor_is_new(tensors):
    with LiveBytes() as live:
        x = torch.tensor([1.0, 2.0])
        assert live.current_bytes == 8
        y = x.detach()
        assert live.current_bytes == 8
    del x, y


def test_lists_and_tuples_of_results(tensors):
    x = torch.ones(16, 16)
    with LiveBytes() as live:
        values, indices = x.max(dim=1)
        scaled = torch._foreach_mul([x, x], 2.0)
        assert live.current_bytes == 16 * (4 + 8) + 2 * KIB
    del values, indices, scaled


def test_resize(tensors):
    old = torch.ones(256)
    with LiveBytes() as live:
        new = torch.ones(256)
        new.resize_(512)
        assert live.current_bytes == 2 * KIB
        new.untyped_storage().resize_(KIB // 2)
        assert live.current_bytes == 2 * KIB  # not seen below dispatch ...
        new[:1].mul_(2)
        assert live.current_bytes == KIB // 2  # ... but at the next op
        old.mul_(2).resize_(1024)
        assert live.current_bytes == KIB // 2 + 3 * KIB  # the growth of a baseline storage
    del new, old
    assert live.current_bytes == 0


def test_backward_is_seen(tensors):
    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        loss = x.exp().sum()
        assert live.current_bytes == KIB + 4
        loss.backward()
        # exp's output is released by backward; x.grad and the loss stay.
        assert live.current_bytes == KIB + 4
        assert x.grad.untyped_storage().nbytes() == KIB
        assert live.peak_bytes == 2 * KIB + 4 + 4  # saved output, x.grad, loss, its gradient
        x.grad = None
    assert live.current_bytes == 4


def test_no_grad_keeps_nothing(tensors):
    def chain(x):
        for _ in range(5):
            x = x.exp()
        return x

    x = torch.ones(256, requires_grad=True)
    with LiveBytes() as live, torch.no_grad():
        chain(x)
    assert live.peak_bytes == 2 * KIB
    with LiveBytes() as live:
        chain(x)
    assert live.peak_bytes == 5 * KIB


def test_checkpoint_is_seen(tensors):
    def block(x):
        return x.exp().exp().exp()

    def peak(run):
        with LiveBytes() as live:
            y = torch.ones(256, requires_grad=True)
            for _ in range(4):
                y = run(y)
            y.sum().backward()
        return live.peak_bytes

    # The leaf and twelve outputs (the name y keeps the last), the loss and its gradient, an exp's backward: in and out.
    assert peak(block) == (1 + 12 + 2) * KIB + 8
    # The leaf and four block outputs, the last block's three outputs again, and the gradient that leaves the last exp.
    assert peak(lambda x: checkpoint(block, x, use_reentrant=False)) == (1 + 4 + 3 + 1) * KIB + 8


def test_snapshot_is_near_the_peak_and_not_quadratic():
    n_storages = 4000
    with FakeTensorMode(), LiveBytes(snapshot=True) as live:
        kept, snapshots = [], set()
        for _ in range(n_storages):
            kept.append(torch.empty(256))
            snapshots.add(live._snapshot_bytes)
        total = sum(entry.storage_bytes for entry in live.peak_entries)
    assert live.peak_bytes == n_storages * KIB
    assert 0.99 * live.peak_bytes <= total <= live.peak_bytes
    assert len(snapshots) < n_storages / 5


def test_peak_entries_say_who_is_there(tensors):
    with LiveBytes(snapshot=True) as live:
        a = torch.ones(256)
        b = a.view(16, 16) @ a.view(16, 16)
        c = torch.cat([a, a])
        assert [e.storage_bytes for e in live.live_entries] == [2 * KIB, KIB, KIB]
        del a, b, c
    assert live.live_entries == []
    assert [tuple(entry) for entry in live.peak_entries] == [
        (2 * KIB, (512,), torch.float32, "aten.cat.default"),
        (KIB, (256,), torch.float32, "aten.ones.default"),
        (KIB, (16, 16), torch.float32, "aten.mm.default"),
    ]
    with pytest.raises(RuntimeError, match="snapshot=True"):
        LiveBytes().peak_entries  # noqa: B018


# A whole model

SEQUENCE = 32


def make_llama(attention="eager", checkpointing=False):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def trace(tensors, attention="eager", checkpointing=False, frozen=False, hoard=None):
    """(peak, left over after the step, saved after forward) in bytes, of one step on a batch of 2."""
    with tensors():
        model = make_llama(attention, checkpointing)
        if frozen:
            model.model.requires_grad_(False)
            model.model.layers[-1].requires_grad_(True)
        if hoard is not None:
            model.model.layers[0].register_forward_hook(lambda module, args, out: hoard.append(out * 1))
        ids = torch.zeros(2, SEQUENCE, dtype=torch.long)
        with LiveBytes() as live:
            with SavedBytes(exclude=model) as saved:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
        gradient_bytes = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        return live.peak_bytes, live.current_bytes - gradient_bytes, saved.total_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_llama_fake_equals_real(checkpointing, frozen):
    fake = trace(FakeTensorMode, checkpointing=checkpointing, frozen=frozen)
    real = trace(contextlib.nullcontext, checkpointing=checkpointing, frozen=frozen)
    assert fake == real
    assert fake[1] == 0  # after the step only gradients are left


def test_llama_checkpointing_lowers_the_peak():
    plain, checkpointed = trace(FakeTensorMode), trace(FakeTensorMode, checkpointing=True)
    assert checkpointed[0] < plain[0] / 2
    assert checkpointed[2] < plain[2] / 5


def test_llama_leak_is_found():
    hoard = []
    clean, leaking = trace(FakeTensorMode), trace(FakeTensorMode, hoard=hoard)
    hidden_bytes = 2 * SEQUENCE * 32 * 4
    assert leaking[1] - clean[1] == hidden_bytes
    assert leaking[0] - clean[0] == hidden_bytes


def test_llama_sdpa_takes_another_branch_on_fake_tensors():
    """Not the ledger's doing: transformers drops an all-ones mask after a look at its values, which fake tensors lack.

    With a mask, sdpa repeats keys and values instead of grouping the heads, so a fake trace is an upper bound.
    """
    fake, real = trace(FakeTensorMode, "sdpa"), trace(contextlib.nullcontext, "sdpa")
    kv_bytes = 2 * SEQUENCE * 2 * 8 * 4  # batch, tokens, heads, head width; K or V of one layer
    mask_bytes = 2 * SEQUENCE * SEQUENCE * 4  # bool for the model, but sdpa saves a float copy in every layer
    heads_per_kv = 2
    assert fake[2] - real[2] == 4 * (2 * (heads_per_kv - 1) * kv_bytes + mask_bytes)
    assert fake[0] > real[0]


def test_what_is_made_in_a_pause_is_left_out(tensors):
    with LiveBytes() as live:
        with live.paused():
            left_out = torch.ones(256)
        left_out.view(16, 16).add_(1)
        assert live.peak_bytes == 0
        counted = left_out * 2
        assert live.current_bytes == live.peak_bytes == KIB
        del left_out
        assert live.current_bytes == KIB and counted is not None
