"""Stored keys and values, and live ones put among them."""

import pytest
import torch

from hf_memtune.core.store import KeyValueStore, place
from tests.support.tolerances import NOTICED


def chunks(length=10, size=4):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, length, 5), torch.randn(2, 3, length, 7)  # values may be of another size
    return keys, values, list(zip(range(0, length, size), keys.split(size, 2), values.split(size, 2)))


@pytest.mark.parametrize("size", [1, 4, 10, 20])
def test_chunks_add_up_to_the_row(size):
    keys, values, parts = chunks(size=size)
    store = KeyValueStore()
    for start, key, value in parts:
        store.write(7, key, value, start, 10)
        found = store.prefix(7, start + key.shape[2])
        assert found[0].equal(keys[:, :, : start + size]) and found[1].equal(values[:, :, : start + size])


def test_a_whole_row_is_kept_without_a_copy():
    keys, values, _ = chunks()
    store = KeyValueStore()
    store.write(0, keys.requires_grad_(), values, 0, 10)
    found, _ = store.prefix(0, 10)
    assert found.data_ptr() == keys.data_ptr() and not found.requires_grad


def problem():
    torch.manual_seed(0)
    stored = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    live = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    return stored, live, index


def test_live_tokens_take_their_places():
    stored, live, index = problem()
    found = place(stored, live, index, None)
    for row in range(2):
        for token in range(6):
            at = (index[row] == token).nonzero().flatten().tolist()
            expected = live[row, :, at[0]] if at else stored[row, :, token]
            assert found[row, :, token].equal(expected)
    assert not found.data_ptr() == stored.data_ptr()


@pytest.mark.parametrize("valid", [None, torch.tensor([[True, True, True], [True, False, True]])], ids=["full", "ragged"])
def test_gradcheck(valid):
    stored, live, index = problem()
    assert torch.autograd.gradcheck(lambda live: place(stored, live, index, valid), (live,))


def test_fillers_change_nothing_and_learn_nothing():
    stored, live, index = problem()
    valid = torch.tensor([[True, True, True], [True, False, True]])
    found = place(stored, live, index, valid)
    assert found[1, :, 3].equal(stored[1, :, 3])
    found.square().sum().backward()
    assert (live.grad[1, :, 1] == 0).all() and (live.grad[0] != 0).any()


def test_a_repeated_position_would_learn_twice():
    """Why fillers are distinct positions: the backward of scatter gives every duplicate the full gradient."""
    stored, live, _ = problem()
    repeated = torch.tensor([[0, 2, 2], [1, 3, 3]])
    place(stored, live, repeated, None).sum().backward()
    assert (live.grad[:, :, 1:].sum(2) - 1).abs().min() > NOTICED
