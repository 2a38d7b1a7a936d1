"""Keys, values and sums of gradients at home in host memory: the same numbers, in memory of their own, few of them on the device."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_memtune.core import offload
from hf_memtune.core.offload import HostMemory, HostTensor, OffloadedStore, OffloadedSums
from hf_memtune.core.owed import Live, OwedGradients, OwedSums
from hf_memtune.core.store import KeyValueStore
from tests.support.tolerances import NOTICED, close

LENGTH, ENTRIES = 10, 4


def rows(seed, channels=5):
    return torch.randn(2, 3, LENGTH, channels, generator=torch.Generator().manual_seed(seed))


def filled(store, size=4):
    """A store with entries 0, 10, 20, 30, written in chunks of all entries; and what was written."""
    written = {10 * n: (rows(n), rows(n + 100, 7)) for n in range(ENTRIES)}  # values may be of another size
    for start in range(0, LENGTH, size):
        for key, parts in written.items():
            chunks = (part[:, :, start : start + size] for part in parts)
            store.write(key, *chunks, start, LENGTH)
            store.prefix(key, min(start + size, LENGTH))  # as a context pass does, so that entries are fetched ahead
    return store, written


@pytest.fixture
def fetched(monkeypatch):
    """Weak references to the storages of all copies that were made on the device."""
    made, fetch = [], HostTensor.fetch

    def noting(self, stop):
        found = fetch(self, stop)
        made.append(weakref.ref(found.ready().untyped_storage()))
        return found

    monkeypatch.setattr(HostTensor, "fetch", noting)
    return made


def alive(references) -> int:
    return sum(reference() is not None for reference in references)


# -- a store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 10, 20, 30), (30, 20, 10, 0), (20, 0, 0, 30, 10)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 10, 20])
def test_prefixes_are_those_of_a_store_on_the_device(size, order):
    store, written = filled(OffloadedStore(HostMemory()), size)
    for stop in (10, 4, 7):  # shorter and longer than what is there of the entry
        for key in order:
            for found, whole in zip(store.prefix(key, stop), written[key]):
                assert found.equal(whole[:, :, :stop]) and not found.requires_grad


def test_a_chunk_reaches_what_was_fetched_ahead_of_it():
    """The next entry is fetched while a chunk of it is still to come: a copy that stays as it was must be noticed."""
    store, written = filled(OffloadedStore(HostMemory()))
    keys, values = written[10]
    store.prefix(0, LENGTH), store.prefix(10, LENGTH)  # the last one asked for
    store.prefix(0, LENGTH)  # and 10 is still there, as the one expected next
    assert 10 in store._here
    store.write(10, keys[:, :, 4:8] + 1, values[:, :, 4:8] + 1, 4, LENGTH)
    found, _ = store.prefix(10, LENGTH)
    assert found[:, :, 4:8].equal(keys[:, :, 4:8] + 1) and found[:, :, :4].equal(keys[:, :, :4])
    again, _ = filled(OffloadedStore(HostMemory()))
    assert again.prefix(10, LENGTH)[0].equal(keys)


def test_homes_are_memory_of_their_own(fetched):
    """Nothing on the device is at home, so that letting go of the one leaves the other; the device's store has one memory."""
    store, written = filled(OffloadedStore(HostMemory()))
    found, _ = store.prefix(0, LENGTH)
    found.zero_()
    store.prefix(20, LENGTH), store.prefix(30, LENGTH)
    assert store.prefix(0, LENGTH)[0].equal(written[0][0])
    one, _ = filled(KeyValueStore())
    one.prefix(0, LENGTH)[0].zero_()
    assert not one.prefix(0, LENGTH)[0].equal(written[0][0])


@pytest.mark.parametrize("step", [1, -1])
def test_two_entries_are_on_the_device_at_most(fetched, step):
    store, _ = filled(OffloadedStore(HostMemory()))
    for key in (0, 10, 20, 30)[::step]:
        store.prefix(key, LENGTH)
        assert alive(fetched) <= 2 * 2  # keys and values
    held = [store.prefix(key, LENGTH) for key in (0, 10, 20, 30)]
    assert alive(fetched) > 2 * 2 and held  # the sibling: the count does see a third


@pytest.mark.parametrize("step", [1, -1])
def test_the_next_entry_is_fetched_ahead(fetched, step):
    store, _ = filled(OffloadedStore(HostMemory()))
    order = (0, 10, 20, 30)[::step]
    for key in order[:2]:
        store.prefix(key, LENGTH)
    before = len(fetched)
    store.prefix(order[2], LENGTH)
    assert len(fetched) == before + 2  # order[3], for order[2] was there
    store.prefix(order[3], LENGTH)
    assert len(fetched) == before + 2  # backward follows: order[2] is expected, and there
    store.prefix(order[2], LENGTH)
    assert len(fetched) == before + 4  # order[1]
    store.prefix(order[0], LENGTH)
    assert len(fetched) > before + 4  # the sibling: what is not expected is fetched when it is asked for


# -- what autograd saves ---------------------------------------------------------------------------------------------


def attend_all(store, query, unsaved=True, checkpointed=False, group=None):
    """Attention through all entries, one after the other."""
    for key in (0, 10, 20, 30):

        def run(query, key=key):
            stored = store.prefix(key, LENGTH)
            with store.unsaved(key, stored) if unsaved else KeyValueStore().unsaved(key, stored):
                keys, values = OwedGradients().attach(key, (query, query), stored, Live(LENGTH - 4, LENGTH))
                return F.scaled_dot_product_attention(query, keys, values)

        query = query + (checkpoint(run, query, use_reentrant=False) if checkpointed else run(query))
    return query


def stores():
    """A store of each kind, with the same entries; keys and values of one size."""
    both = OffloadedStore(HostMemory()), KeyValueStore()
    for store in both:
        for n in range(ENTRIES):
            store.write(10 * n, rows(n)[:, :, :4], rows(n + 100)[:, :, :4], 0, LENGTH)
            store.write(10 * n, rows(n)[:, :, 4:], rows(n + 100)[:, :, 4:], 4, LENGTH)
    return both


def query():
    return rows(7)[:, :, :4].requires_grad_()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_a_store_on_the_device(checkpointed):
    found, expected = (
        torch.autograd.grad(attend_all(store, q, checkpointed=checkpointed).square().sum(), q)[0]
        for store, q in ((store, query()) for store in stores())
    )
    assert found.equal(expected)
    other, _ = stores()
    other._homes[20][0]._home_TBKC.mul_(1.1)
    q = query()
    wrong = torch.autograd.grad(attend_all(other, q, checkpointed=checkpointed).square().sum(), q)[0]
    assert (wrong - expected).abs().max() > NOTICED


def test_no_copy_is_saved(fetched):
    store, _ = stores()
    output = attend_all(store, query())
    assert alive(fetched) <= 2 * 2 and output.requires_grad
    output.square().sum().backward()
    assert alive(fetched) <= 2 * 2


def test_without_care_all_copies_would_be_saved(fetched):
    """The sibling: the kernel does save its keys and values."""
    store, _ = stores()
    output = attend_all(store, query(), unsaved=False)
    assert alive(fetched) == 2 * ENTRIES and output.requires_grad


def test_backward_fetches_each_entry_once(fetched):
    store, _ = stores()
    output = attend_all(store, query())
    before = len(fetched)
    output.square().sum().backward()
    assert len(fetched) - before == 2 * (ENTRIES - 2)  # two are there from the forward pass


@pytest.mark.parametrize("checkpointed, saved", [(False, True), (True, False)])
def test_other_tensors_are_saved_as_without(checkpointed, saved):
    """Under activation checkpointing nothing inside of it is saved: its hooks must see what these let pass."""
    store, _ = stores()
    kept = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            copy = x.clone()
            kept.append(weakref.ref(copy.untyped_storage()))
            ctx.save_for_backward(copy)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    def run(x):
        stored = store.prefix(0, LENGTH)
        with store.unsaved(0, stored):
            return Noted.apply(x)

    x = query()
    output = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    assert (alive(kept) == 1) is saved
    output.sum().backward()
    assert x.grad.equal(x.detach())


def test_older_torch_saves_them_itself(monkeypatch):
    """It does not tell which hooks are in force: the numbers are the same."""
    monkeypatch.setattr(offload, "saved_tensors_hooks_in_force", lambda: None)
    test_gradients_are_those_of_a_store_on_the_device(True)


# -- sums ------------------------------------------------------------------------------------------------------------


def settled(sums, dtype=None):
    """What three chunks are given, from the last to the first, each with a gradient of all tokens up to its end; and the mass left."""
    owed = OwedGradients(dtype, sums)
    bounds, found, masses = [(0, 4), (4, 8), (8, 10)], [], []
    for number, (start, stop) in reversed(list(enumerate(bounds))):
        for part in ("key", "value"):
            found.append(owed.settle((0, part), rows(number)[:, :, :stop], Live(start, stop)))
        masses.append(owed.mass(start))
    return found, masses


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_sums_are_those_on_the_device(dtype):
    (found, masses), (expected, expected_masses) = settled(OffloadedSums(HostMemory()), dtype), settled(OwedSums(), dtype)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(found, expected))
    torch.testing.assert_close(masses[:-1], expected_masses[:-1], **close(torch.float32))  # summed in another order
    assert masses[-1] is expected_masses[-1] is None


def test_a_sum_that_does_not_go_home_is_noticed(monkeypatch):
    put = OffloadedSums.put
    monkeypatch.setattr(OffloadedSums, "put", lambda self, key, owed: None if key in self._homes else put(self, key, owed))
    (found, _), (expected, _) = settled(OffloadedSums(HostMemory())), settled(OwedSums())
    assert (found[-1] - expected[-1]).abs().max() > NOTICED


def test_no_sum_stays_on_the_device(fetched):
    sums = OffloadedSums(HostMemory())
    for key in range(ENTRIES):
        sums.put((key, "key"), rows(key))
        sums.put((key, "key"), sums.get((key, "key"), LENGTH).add_(1))
    assert alive(fetched) == 0 and len(fetched) == ENTRIES
    kept = sums.get((0, "key"), LENGTH)
    assert alive(fetched) == 1 and kept.equal(rows(0) + 1)
    for key in sums.keys():
        sums.drop(key)
    assert sums.get((0, "key"), LENGTH) is None
