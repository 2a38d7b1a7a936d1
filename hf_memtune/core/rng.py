"""Replay of random numbers: a part of a pass that runs twice must draw the same dropout masks both times."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_memtune._compat import which, with_values


class RandomTape:
    """States of torch's generators (that of the CPU, and those of `devices`), kept under names, to go back to."""

    def __init__(self, devices: Iterable[torch.device]):
        self._devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self._states: dict[object, tuple] = {}

    def record(self, name: object) -> None:
        """Keep the present state under a name."""
        self._states[name] = self._present()

    def replay(self, name: object) -> None:
        """Go back to a state that was kept; a name without one changes nothing."""
        if name not in self._states:
            return
        self._go_to(self._states[name])

    def has_moved(self, name: object) -> bool:
        """Whether numbers were drawn since a state was kept."""
        (on_cpu, on_devices), (then_on_cpu, then_on_devices) = self._present(), self._states[name]
        pairs = [(on_cpu, then_on_cpu), *zip(on_devices, then_on_devices)]
        with with_values():  # states have them, also while memory is being traced
            return not all(torch.equal(now, then) for now, then in pairs)

    def forget_if_still(self, name: object) -> None:
        """Forget a state (5 KB of the CPU's) from which nothing was drawn since it was kept."""
        if not self.has_moved(name):
            del self._states[name]

    @contextmanager
    def replaying(self, name: object) -> Iterator[None]:
        """While open, the numbers that were drawn from a state that was kept come again; those drawn afterwards are new ones.

        Under a name without a state, what is drawn comes again afterwards.
        """
        present = self._present()
        self.replay(name)
        try:
            yield
        finally:
            self._go_to(present)

    def _present(self) -> tuple:
        return torch.get_rng_state(), [device_state(device) for device in self._devices]

    def _go_to(self, state: tuple) -> None:
        on_cpu, on_devices = state
        torch.set_rng_state(on_cpu)
        for device, found in zip(self._devices, on_devices):
            set_device_state(device, found)


def device_state(device: torch.device) -> Tensor:
    """The state of the generator of a device that has one of its own."""
    return torch.get_device_module(device).get_rng_state(*which(device))


def set_device_state(device: torch.device, state: Tensor) -> None:
    torch.get_device_module(device).set_rng_state(state, *which(device))
