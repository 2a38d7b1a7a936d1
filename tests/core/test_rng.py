"""Random numbers that come again, where a part of a pass runs twice, and only there."""

import pytest
import torch

from hf_memtune.core.rng import RandomTape


@pytest.fixture
def tape():
    torch.manual_seed(0)
    return RandomTape([torch.device("cpu")])


def test_replayed_numbers_are_those_that_were_drawn(tape):
    drawn = []
    for name in range(3):
        tape.record(name)
        drawn.append(torch.rand(4))
    for name in (2, 0, 1):
        tape.replay(name)
        assert torch.equal(torch.rand(4), drawn[name])
    assert not torch.equal(torch.rand(4), drawn[1])  # the next ones are others


def test_a_name_without_a_state_changes_nothing(tape):
    before = torch.get_rng_state()
    tape.replay("unknown")
    with tape.replaying("unknown"):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_may_be_recorded_anew(tape):
    tape.record("a")
    first = torch.rand(4)
    tape.record("a")
    second = torch.rand(4)
    tape.replay("a")
    assert torch.equal(torch.rand(4), second) and not torch.equal(first, second)


def test_numbers_drawn_after_a_replay_are_new(tape):
    """`replaying` goes on where it began; `replay` alone would give the numbers after the recorded part once more."""
    tape.record("a")
    inside, after, later = torch.rand(4), torch.rand(4), torch.get_rng_state()
    with tape.replaying("a"):
        assert torch.equal(torch.rand(4), inside)
    assert torch.equal(torch.get_rng_state(), later)
    tape.replay("a")
    torch.rand(4)
    assert torch.equal(torch.rand(4), after)


def test_a_replay_that_fails_goes_back_all_the_same(tape):
    tape.record("a")
    torch.rand(4)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), tape.replaying("a"):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_has_a_state_of_its_own():
    device = torch.device("cuda")
    tape = RandomTape([device])
    tape.record("a")
    drawn = torch.rand(4, device=device)
    assert not torch.equal(torch.rand(4, device=device), drawn)
    tape.replay("a")
    assert torch.equal(torch.rand(4, device=device), drawn)


def test_a_tape_tells_whether_numbers_were_drawn(tape):
    tape.record("a")
    torch.ones(3).add_(1)
    assert not tape.has_moved("a")
    torch.nn.functional.dropout(torch.ones(3))
    assert tape.has_moved("a")
