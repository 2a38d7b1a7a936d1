"""Keys, values and sums of gradients at home in host memory: the same numbers, in memory of their own, few of them on the device."""

import weakref

import pytest
import torch

from hf_memtune.core import offload
from hf_memtune.core.offload import HostMemory, HostTensor, OffloadedStore, OffloadedSums, segments
from hf_memtune.core.owed import Live, OwedGradients, OwedSums
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError
from hf_memtune.memory import LiveBytes
from tests.support.tolerances import NOTICED, close

LENGTH, ENTRIES = 10, 4


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Of 4, 4, 1 and 1 tokens of keys."""
    monkeypatch.setattr(offload, "SEGMENT_BYTES", 512)
    monkeypatch.setattr(offload, "REST_BYTES", 128)


def rows(seed, channels=5):
    return torch.randn(2, 3, LENGTH, channels, generator=torch.Generator().manual_seed(seed))


def filled(store, size=4):
    """A store with entries 0, 10, 20, 30, written in chunks of all entries; and what was written."""
    written = {10 * n: (rows(n), rows(n + 100, 7)) for n in range(ENTRIES)}  # values may be of another size
    for start in range(0, LENGTH, size):
        for key, parts in written.items():
            store.write(key, *(part[:, :, start : start + size] for part in parts), start, LENGTH)
    return store, written


@pytest.fixture
def fetched(monkeypatch):
    """Weak references to the storages of all copies that were made on the device."""
    made, fetch = [], HostTensor.fetch

    def noting(self, start, stop):
        found = fetch(self, start, stop)
        made.append(weakref.ref(found.ready().untyped_storage()))
        return found

    monkeypatch.setattr(HostTensor, "fetch", noting)
    return made


def alive(references) -> int:
    return sum(reference() is not None for reference in references)


# -- a store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [KeyValueStore, lambda: OffloadedStore(HostMemory())], ids=["device", "host"])
def test_a_store_that_forgets_begins_anew(make):
    """The next entries may be of another size; those before let go of their memory."""
    store, _ = filled(make())
    assert store.keys() == [0, 10, 20, 30]
    store.clear()
    assert store.keys() == []
    with pytest.raises(MemTuneError):
        store.prefix(0, 1)
    key, value = rows(5)[:, :1], rows(6)[:, :1]
    store.write(0, key, value, 0, LENGTH)
    assert all(found.equal(whole) for found, whole in zip(store.prefix(0, LENGTH), (key, value)))


@pytest.mark.parametrize("order", [(0, 10, 20, 30), (30, 20, 10, 0), (20, 0, 0, 30, 10)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 10, 20])
def test_prefixes_are_those_of_a_store_on_the_device(size, order):
    store, written = filled(OffloadedStore(HostMemory()), size)
    for stop in (10, 4, 7):  # shorter and longer than what is there of the entry
        for key in order:
            for found, whole in zip(store.prefix(key, stop), written[key]):
                assert found.equal(whole[:, :, :stop]) and not found.requires_grad


@pytest.mark.parametrize("bounds", [[(0, 10)], [(0, 3), (3, 6), (6, 10)], [(4, 7), (2, 3)]], ids=str)
def test_blocks_are_those_of_a_store_on_the_device(bounds):
    store, written = filled(OffloadedStore(HostMemory()))
    for key, parts in written.items():
        for (start, stop), found in zip(bounds, store.read(key, bounds)):
            assert all(a.equal(whole[:, :, start:stop]) for a, whole in zip(found, parts))
    store.write(20, *(part[:, :, 4:8] + 1 for part in written[20]), 4, LENGTH)
    changed = next(store.read(20, [(2, 6)]))[0]
    assert changed[:, :, :2].equal(written[20][0][:, :, 2:4]) and not changed[:, :, 2:].equal(written[20][0][:, :, 4:6])


@pytest.mark.parametrize("kind", [lambda: OffloadedStore(HostMemory()), KeyValueStore], ids=["host", "device"])
def test_tokens_that_were_never_written_are_not_read(kind):
    store = kind()
    store.write(0, rows(0)[:, :, 4:8], rows(0)[:, :, 4:8], 4, LENGTH)
    with pytest.raises(MemTuneError, match="has keys and values of 0 tokens where 8 are attended to"):
        next(store.read(0, [(4, 8)]))


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


def test_two_blocks_are_on_the_device_at_most(fetched):
    store, _ = filled(OffloadedStore(HostMemory()))
    for keys, values in store.read(10, [(0, 4), (4, 8), (8, 10)]):
        assert alive(fetched) <= 2 * 2  # the block at hand, and the one after it
        del keys, values
    held = list(store.read(10, [(0, 4), (4, 8), (8, 10)]))
    assert alive(fetched) > 2 * 2 and held  # the sibling: the count does see a third


def test_the_next_block_is_fetched_while_this_one_is_used(fetched):
    store, _ = filled(OffloadedStore(HostMemory()))
    reader = store.read(10, [(0, 4), (4, 8), (8, 10)])
    seen = []
    for _ in range(3):
        next(reader)
        seen.append(len(fetched))
    assert seen == [4, 6, 6]


def rounded_up(length, token_bytes, sizes):
    """Bytes that torch makes of these segments, beyond those of the tokens."""
    assert sum(sizes) == length and min(sizes) > 0
    return sum(1 << (size * token_bytes - 1).bit_length() for size in sizes) - length * token_bytes


@pytest.mark.parametrize("token_bytes", [2**13, 2**12, 1792, 4608, 7 * 2**18])  # of one row of Llama-3.1-8B, its keys, and others
@pytest.mark.parametrize("length", [1, 2047, 4096, 40_000, 355_000])
def test_little_of_pinned_memory_is_rounding(monkeypatch, length, token_bytes):
    monkeypatch.undo()
    sizes = list(segments(length, token_bytes))
    assert rounded_up(length, token_bytes, sizes) < (len(sizes) - 1) * token_bytes + max(offload.REST_BYTES, token_bytes)
    if length == 355_000:
        assert rounded_up(length, token_bytes, sizes) < 0.02 * length * token_bytes
        assert rounded_up(length, token_bytes, [length]) > 0.3 * length * token_bytes  # the sibling: in one piece


def test_homes_are_made_in_segments():
    asked = []

    class Asked(HostMemory):
        def empty(self, shape, *args):
            asked.append(shape[0])
            return super().empty(shape, *args)

    HostTensor(Asked(), rows(0), LENGTH)
    assert asked == [4, 4, 1, 1] == list(segments(LENGTH, 2 * 3 * 5 * 4))


def test_segments_that_are_taken_for_one_another_are_noticed(monkeypatch):
    homes = HostTensor._homes
    monkeypatch.setattr(HostTensor, "_homes", lambda self, *where: [(after, home.flip(0)) for after, home in homes(self, *where)])
    store, written = filled(OffloadedStore(HostMemory()))
    assert not store.prefix(0, LENGTH)[0].equal(written[0][0])


# -- sums ------------------------------------------------------------------------------------------------------------


def settled(sums, dtype=None):
    """What three chunks are given, from the last to the first, each with a gradient of all tokens up to its end; and the mass left."""
    owed = OwedGradients(dtype, sums)
    bounds, found, masses = [(0, 4), (4, 8), (8, 10)], [], []
    for number, (start, stop) in reversed(list(enumerate(bounds))):
        for part in ("key", "value"):
            gradient = rows(number)[:, :, :stop]
            for first in range(0, start, 3):
                owed.book((0, part), gradient[:, :, first : min(first + 3, start)], first, start, gradient.dtype)
            found.append(owed.settle((0, part), gradient[:, :, start:], Live(start, stop)))
        masses.append(owed.mass(start))
    return found, masses


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_sums_are_those_on_the_device(dtype):
    (found, masses), (expected, expected_masses) = settled(OffloadedSums(HostMemory()), dtype), settled(OwedSums(), dtype)
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(found, expected))
    torch.testing.assert_close(masses[:-1], expected_masses[:-1], **close(torch.float32))  # summed in another order
    assert masses[-1] is expected_masses[-1] is None


def test_a_sum_that_does_not_go_home_is_noticed(monkeypatch):
    send = HostTensor.send
    monkeypatch.setattr(HostTensor, "send", lambda self, part, start: None if start else send(self, part, start))
    (found, _), (expected, _) = settled(OffloadedSums(HostMemory())), settled(OwedSums())
    assert (found[2] - expected[2]).abs().max() > NOTICED


def test_no_sum_stays_on_the_device(fetched):
    sums = OffloadedSums(HostMemory())
    for key in range(ENTRIES):
        for _ in range(2):
            sums.add((key, "key"), rows(key), 0, LENGTH, torch.float32)
    assert alive(fetched) == 0 and len(fetched) == 2 * ENTRIES and sums.tensors() == []
    kept = sums.get((0, "key"), 2, 5)
    assert alive(fetched) == 1 and kept.equal(2 * rows(0)[:, :, 2:5])
    for key in sums.keys():
        sums.drop(key)
    assert sums.get((0, "key"), 0, LENGTH) is None


def test_the_mass_of_a_row_is_taken_a_block_at_a_time(monkeypatch):
    """Of sums in host memory a block is on the device, and its copies, whatever the length of the row."""
    monkeypatch.setattr("hf_memtune.core.owed.BLOCK", 16)
    found, gradient = {}, torch.randn(2, 3, 512, 4, generator=torch.Generator().manual_seed(0))
    debts = OwedGradients(None, OffloadedSums(HostMemory()))
    for name in ("key", "value"):
        debts.book((0, name), gradient, 0, 512, gradient.dtype)
    for length in (256, 512):
        with LiveBytes() as live:
            found[length] = debts.mass(length)
        of_block, of_mass = 16 * 2 * 3 * 4 * 4, length * 2 * 4
        assert 2 * of_block <= live.peak_bytes <= 3 * of_block + 3 * of_mass
    torch.testing.assert_close(found[512], (2 * gradient.square().sum((1, 3))).sqrt(), **close(torch.float32))
    monkeypatch.setattr("hf_memtune.core.owed.BLOCK", 512)
    with LiveBytes() as live:
        assert debts.mass(512).equal(found[512])
    assert live.peak_bytes > 2 * 512 * 2 * 3 * 4 * 4  # the sibling: at once
