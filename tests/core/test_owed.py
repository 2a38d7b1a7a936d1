"""Gradients that are owed to earlier tokens: with them, chunks that go backward one by one give what all would give at once."""

import pytest
import torch

from hf_memtune.core.owed import Live, OwedGradients
from tests.support.tolerances import NOTICED, close

ROWS, HEADS, TOKENS, CHANNELS = 2, 3, 7, 4
BOUNDS = [(0, 3), (3, 6), (6, 7)]  # the last chunk is shorter


@pytest.fixture
def inputs():
    """Live keys and values of a row, and queries, float64."""
    torch.manual_seed(0)
    return [torch.randn(ROWS, HEADS, TOKENS, CHANNELS, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def attention(query, key, value, start):
    scores = query @ key.transpose(2, 3)
    seen = torch.arange(key.shape[2]) <= start + torch.arange(query.shape[2])[:, None]
    return (scores.masked_fill(~seen, -torch.inf).softmax(3) @ value).square().sum()


def at_once(inputs):
    """Autograd through the whole row."""
    query, key, value = inputs
    return torch.autograd.grad(attention(query, key, value, 0), inputs)


def in_a_stream(inputs, owed, bounds=BOUNDS, order=reversed, tokens=Live, passes=1):
    """Chunk by chunk; `passes` modules that read the same live keys and values, each with its own debts."""
    query, key, value = inputs
    stored = [part.detach().clone() for part in (key, value)]
    for start, stop in order(bounds):
        live = tokens(start, stop)
        pick = slice(start, stop) if live.index is None else live.index[0]
        for module in range(passes):
            prefix = tuple(part[:, :, :stop] for part in stored)
            keys, values = owed.attach(module, (key[:, :, pick], value[:, :, pick]), prefix, live)
            attention(query[:, :, start:stop], keys, values, start).backward()
    found = [part.grad for part in inputs]
    for part in inputs:
        part.grad = None
    return found


@pytest.mark.parametrize("bounds", [BOUNDS, [(0, 7)], [(n, n + 1) for n in range(7)]], ids=["chunks", "row", "tokens"])
def test_a_stream_gives_what_autograd_gives_at_once(inputs, bounds):
    for found, expected in zip(in_a_stream(inputs, OwedGradients(), bounds), at_once(inputs)):
        torch.testing.assert_close(found, expected, **close(torch.float64))


def test_every_module_has_debts_of_its_own(inputs):
    for found, expected in zip(in_a_stream(inputs, OwedGradients(), passes=2), at_once(inputs)):
        torch.testing.assert_close(found, 2 * expected, **close(torch.float64))


def test_debts_that_are_forgotten_are_noticed(inputs):
    class Forgetful(OwedGradients):
        def book(self, *args):
            pass

    query, key, value = zip(in_a_stream(inputs, Forgetful()), at_once(inputs))
    torch.testing.assert_close(*query, **close(torch.float64))  # queries look back, and nothing is owed to them
    assert all((found - expected).norm() > NOTICED * expected.norm() for found, expected in (key, value))


def test_chosen_tokens_of_a_chunk_get_what_is_theirs(inputs):
    """In any order, and nothing reaches the keys and values of those that do not run."""
    chosen = {0: [0, 2], 3: [5, 3, 4], 6: [6]}
    live = lambda start, stop: Live(start, stop, torch.tensor([chosen[start]]).expand(ROWS, -1))  # noqa: E731
    found, expected = in_a_stream(inputs, OwedGradients(), tokens=live), at_once(inputs)
    torch.testing.assert_close(found[1][:, :, 2:], expected[1][:, :, 2:], **close(torch.float64))
    assert not found[1][:, :, 1].any() and expected[1][:, :, 1].any()


def test_fillers_get_nothing():
    owed, tokens = OwedGradients(), Live(0, 3, torch.tensor([[1, 2], [0, 1]]), torch.tensor([[True, True], [True, False]]))
    gradient = torch.arange(2 * 1 * 3 * 1.0).view(2, 1, 3, 1) + 1
    assert owed.settle((0, "key"), gradient, tokens)[:, 0, :, 0].tolist() == [[2, 3], [4, 0]]
    without = Live(0, 3, tokens.index)
    assert owed.settle((0, "key"), gradient, without)[:, 0, :, 0].tolist() == [[2, 3], [4, 5]]


def test_nothing_stored_is_copied_or_changed(inputs):
    _, key, value = inputs
    stored = [part.detach().clone() for part in (key, value)]
    given = OwedGradients().attach(0, (key, value), tuple(stored), Live(0, TOKENS))
    for there, part in zip(stored, given):
        assert part.untyped_storage().data_ptr() == there.untyped_storage().data_ptr() and part.requires_grad
        assert torch.equal(part, there)


def test_mass_is_the_norm_over_all_modules(inputs):
    owed = OwedGradients()
    assert owed.mass(TOKENS) is None
    gradient = {name: torch.randn(ROWS, HEADS, TOKENS, CHANNELS) for name in [(0, "key"), (0, "value"), (1, "key")]}
    for name, part in gradient.items():
        owed.book(name, part[:, :, :6], 0, 6, part.dtype)
    expected = torch.stack(list(gradient.values())).square().sum((0, 2, 4)).sqrt()[:, :6]
    torch.testing.assert_close(owed.mass(6), expected, **close(torch.float32))
    torch.testing.assert_close(owed.mass(3), expected[:, :3], **close(torch.float32))
    assert (owed.mass(6) - 2**0.5 * expected).norm() > NOTICED


def owed_by_ones(dtype, tokens=300):
    """What the first of the tokens is owed by all others, each of which is a chunk, and owes 1 to all before it."""
    owed = OwedGradients(dtype)
    for start in range(tokens - 1, 0, -1):
        gradient = torch.ones(1, 1, start + 1, 1, dtype=torch.bfloat16)
        owed.book((0, "key"), gradient[:, :, :start], 0, start, gradient.dtype)
        own = owed.settle((0, "key"), gradient[:, :, start:], Live(start, start + 1))
    assert own.dtype == torch.bfloat16
    return owed.mass(1).item()


def test_sums_may_be_wider_than_what_they_sum():
    """Bfloat16 counts to 256."""
    assert owed_by_ones(torch.float32) == 299 and owed_by_ones(None) == 256
