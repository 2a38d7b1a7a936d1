"""A chunk's attention to the stored keys, piece by piece: output and gradients are those of one softmax over all of them."""

import weakref

import pytest
import torch

from hf_memtune.core import attention_kernels, pieces
from hf_memtune.core.offload import HostMemory, HostTensor, OffloadedStore, OffloadedSums
from hf_memtune.core.owed import Live, OwedGradients
from hf_memtune.core.pieces import Piece, Prefix, attend, attend_with_gradient
from hf_memtune.core.store import KeyValueStore
from tests.support.tolerances import NOTICED, close

ROWS, HEADS, KEY_HEADS, TOKENS, CHANNELS = 2, 4, 2, 11, 8
BOUNDS = [(0, 4), (4, 8), (8, 11)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 3)


@pytest.fixture(params=["fused", "plain"])
def kernel(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(pieces, "kernel_for", lambda *args: attention_kernels.PLAIN)


def inputs():
    torch.manual_seed(0)
    shapes = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(ROWS, heads, TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True) for heads in shapes]


def causal(queries, keys):
    return keys[None] <= queries[:, None]


def window(queries, keys):
    return causal(queries, keys) & (keys[None] > queries[:, None] - 3)


def padded(queries, keys):
    """The first five tokens of the second row are padding; three of them see nothing."""
    real = torch.ones(ROWS, 1, 1, len(keys), dtype=torch.bool)
    real[1, ..., keys < 5] = False
    return causal(queries, keys) & real


RULES = {"causal": causal, "window": window, "padded": padded}


def pieces_of(rule, start, stop):
    """Every key apart, or the chunk's own together, as masks: the least that a rule can be cut into."""
    queries, found = torch.arange(start, stop), []
    for first, last in [(n, min(n + 3, start)) for n in range(0, start, 3)] + [(start, stop)]:
        seen = rule(queries, torch.arange(first, last))
        seen = seen.expand(seen.shape[0] if seen.dim() == 4 else 1, 1, stop - start, last - first)
        if rule is causal:
            found.append(Piece(first, last, causal=first == start))
        elif seen.any() or first == start:
            found.append(Piece(first, last, seen=seen, looking=seen.any(-1)))
    return found


def at_once(query, key, value, rule):
    at = torch.arange(TOKENS)
    seen = rule(at, at)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
    return weights @ value.repeat_interleave(2, 1)


def in_pieces(query, key, value, rule, store, owed, cut=pieces_of):
    """The chunks forward, and backward from the last one; the loss is that of `toward`."""
    parts = [[part[:, :, start:stop] for part in (query, key, value)] for start, stop in BOUNDS]
    for (start, _), (_, k, v) in zip(BOUNDS, parts):
        store.write(7, k, v, start, TOKENS)
    outputs = []
    for (start, stop), (q, k, v) in reversed(list(zip(BOUNDS, parts))):
        prefix = Prefix(store, 7, cut(rule, start, stop), 0.3, owed, Live(start, stop))
        assert torch.equal(attend(q.detach(), prefix).output, attend_with_gradient(q, k, v, prefix))
        outputs.append(attend_with_gradient(q, k, v, prefix))
        (outputs[-1] * toward()[:, :, start:stop]).sum().backward()
    return torch.cat(outputs[::-1], 2)


def toward():
    return torch.randn(ROWS, HEADS, TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def both(rule, store=None, sums=None, cut=pieces_of):
    """Output and gradients, in pieces and at once."""
    leaves, ours = inputs(), inputs()
    expected = at_once(*leaves, rule)
    (expected * toward()).sum().backward()
    found = in_pieces(*ours, rule, store or KeyValueStore(), OwedGradients(None, sums), cut)
    return [found.detach(), *(part.grad for part in ours)], [expected.detach(), *(part.grad for part in leaves)]


@pytest.mark.parametrize("rule", RULES)
def test_pieces_give_what_one_softmax_gives(kernel, rule):
    for found, expected in zip(*both(RULES[rule])):
        torch.testing.assert_close(found, expected, **close(torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_so_they_do_from_host_memory_bit_for_bit(rule):
    found, _ = both(RULES[rule], OffloadedStore(HostMemory()), OffloadedSums(HostMemory()))
    assert all(torch.equal(a, b) for a, b in zip(found, both(RULES[rule])[0]))


@pytest.mark.parametrize("rule", RULES)
def test_a_piece_that_is_left_out_is_noticed(rule):
    for found, expected in zip(*both(RULES[rule], cut=lambda *args: pieces_of(*args)[-1:])):
        assert (found - expected).norm() > NOTICED * expected.norm()


def test_what_is_owed_is_needed(monkeypatch):
    monkeypatch.setattr(OwedGradients, "book", lambda *args: None)
    output, query, key, value = zip(*both(causal))
    for found, expected in (output, query):
        torch.testing.assert_close(found, expected, **close(torch.float64))
    assert all((found - expected).norm() > NOTICED * expected.norm() for found, expected in (key, value))


def test_who_sees_nothing_gets_nothing():
    query, key, value = inputs()
    store, seen = KeyValueStore(), torch.zeros(ROWS, 1, 1, TOKENS, dtype=torch.bool)
    store.write(7, key, value, 0, TOKENS)
    prefix = Prefix(
        store, 7, [Piece(0, TOKENS, seen=seen, looking=seen.any(-1).expand(ROWS, 1, TOKENS))], 0.3, OwedGradients(), Live(0, TOKENS)
    )
    output = attend_with_gradient(query, key, value, prefix)
    output.sum().backward()
    assert not output.any() and not any(part.grad.any() or part.grad.isnan().any() for part in (query, key, value))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_frozen_keys_or_values_are_owed_nothing(wanted):
    query, *rest = inputs()
    key, value = (part.requires_grad_(is_wanted) for part, is_wanted in zip((p.detach() for p in rest), wanted))
    store, owed = KeyValueStore(), OwedGradients()
    store.write(7, key, value, 0, TOKENS)
    prefix = Prefix(store, 7, [Piece(0, 8), Piece(8, TOKENS, causal=True)], 0.3, owed, Live(8, TOKENS))
    attend_with_gradient(*(part[:, :, 8:] for part in (query, key, value)), prefix).sum().backward()
    assert [part.grad is not None for part in (key, value)] == list(wanted) and query.grad is not None
    assert len(owed.tensors()) == sum(wanted)


def test_only_queries_are_saved():
    query, key, value = inputs()
    store, saved = KeyValueStore(), []
    store.write(7, key, value, 0, TOKENS)
    prefix = Prefix(store, 7, [Piece(0, 8), Piece(8, TOKENS, causal=True)], 0.3, OwedGradients(), Live(8, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        attend_with_gradient(*(part[:, :, 8:] for part in (query, key, value)), prefix)
    assert sorted(saved) == sorted([(ROWS, HEADS, 3, CHANNELS), (ROWS, HEADS, 3, CHANNELS), (ROWS, HEADS, 3)])


def test_two_blocks_are_on_the_device(monkeypatch):
    """The one at hand, and the one after it; a reader that holds on to them has more."""
    made, fetch, most = [], HostTensor.fetch, []

    def noting(self, start, stop):
        found = fetch(self, start, stop)
        made.append(weakref.ref(found.ready().untyped_storage()))
        most.append(sum(reference() is not None for reference in made))
        return found

    store = OffloadedStore(HostMemory())
    query, key, value = (part.detach() for part in inputs())
    store.write(7, key, value, 0, TOKENS)
    monkeypatch.setattr(HostTensor, "fetch", noting)
    attend(query[:, :, 8:], Prefix(store, 7, [Piece(0, 8), Piece(8, TOKENS, causal=True)], 0.3))
    assert len(made) == 2 * 4 and max(most) == 2 * 2
    held = list(store.read(7, [(0, 3), (3, 6), (6, 9)]))
    assert max(most) > 2 * 2 and held


def test_sums_are_allocated_once():
    query, key, value = inputs()
    store, owed = KeyValueStore(), OwedGradients()
    in_pieces(query, key, value, causal, store, owed)
    assert owed.tensors() == []  # the first chunk is the last to go backward
    where = set()
    store.write(7, key, value, 0, TOKENS)
    for start, stop in BOUNDS[:0:-1]:
        prefix = Prefix(store, 7, pieces_of(causal, start, stop), 0.3, owed, Live(start, stop))
        attend_with_gradient(*(part[:, :, start:stop] for part in (query, key, value)), prefix).sum().backward()
        where |= {part.untyped_storage().data_ptr() for part in owed.tensors()}
    assert len(where) == 2  # keys and values
