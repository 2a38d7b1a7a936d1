"""Random numbers that come again, where a part of a pass runs twice, and only there."""

import pytest
import torch

from hf_memtune.core.recompute import Autocast, Surroundings
from hf_memtune.core.rng import RandomTape
from hf_memtune.training.rng import Generators, preserved_rng


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
        drawn = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(torch.rand(4), drawn)


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


# -- devices -----------------------------------------------------------------------------------------------------------


class DeviceModule:
    """What torch.cuda or torch.mps is to a generator. names: of devices that it asks for; of mps there is one, and no name is taken."""

    def __init__(self, *names: torch.device):
        self.names, self.generator = names, torch.Generator().manual_seed(0)

    def get_rng_state(self, *names):
        assert names == self.names
        return self.generator.get_state()

    def set_rng_state(self, state, *names):
        assert names == self.names
        self.generator.set_state(state)

    def draw(self):
        return torch.rand(4, generator=self.generator)


@pytest.fixture(params=["cuda:1", "mps"])
def device(request, monkeypatch):
    """A device, and the module that its generator belongs to."""
    named = torch.device(request.param)
    module = DeviceModule(*(() if named.type == "mps" else (named,)))
    monkeypatch.setattr(torch, "get_device_module", lambda asked: module if torch.device(asked).type == named.type else torch.cpu)
    return named, module


def test_a_device_has_a_state_of_its_own(device):
    named, module = device
    tape, without = RandomTape([torch.device("cpu"), named]), RandomTape([torch.device("cpu")])
    for each in (tape, without):
        each.record("a")
    drawn = module.draw()
    assert tape.has_moved("a") and not without.has_moved("a")
    with tape.replaying("a"):
        assert torch.equal(module.draw(), drawn)
    following = module.draw()
    assert not torch.equal(following, drawn)
    without.replay("a")
    assert not torch.equal(module.draw(), drawn)
    tape.replay("a")
    assert torch.equal(module.draw(), drawn) and torch.equal(module.draw(), following)


def test_a_layer_that_runs_again_draws_on_its_device_what_it_drew(device):
    named, module = device
    with pytest.MonkeyPatch.context() as patch:  # of a device that torch was not built for it knows no autocast
        patch.setattr("hf_memtune.core.recompute.Autocast", lambda device: Autocast(torch.device("cpu")))
        surroundings = Surroundings(named)
    drawn = module.draw()
    surroundings.settle()
    after = module.generator.get_state()
    with surroundings.restored():
        assert torch.equal(module.draw(), drawn)
    assert torch.equal(module.generator.get_state(), after)


def test_generators_of_a_training_are_put_back_on_its_device(device):
    named, module = device
    before = Generators.now(named)
    drawn, on_cpu = module.draw(), torch.rand(4)
    before.restore()
    assert torch.equal(module.draw(), drawn) and torch.equal(torch.rand(4), on_cpu)
    with preserved_rng(named):
        module.draw()
    assert not torch.equal(module.draw(), drawn)


def test_a_tape_tells_whether_numbers_were_drawn(tape):
    tape.record("a")
    torch.ones(3).add_(1)
    assert not tape.has_moved("a")
    torch.nn.functional.dropout(torch.ones(3))
    assert tape.has_moved("a")
