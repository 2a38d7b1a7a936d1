"""Replay of random numbers: a part of a pass that runs twice must draw the same dropout masks both times."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomTape:
    """States of torch's generators (CPU, and `device` where it has its own), kept under names, to go back to."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self._states: dict[object, tuple] = {}

    def record(self, name: object) -> None:
        """Keep the present state under a name."""
        on_device = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._states[name] = (torch.get_rng_state(), on_device)

    def replay(self, name: object) -> None:
        """Go back to a state that was kept; a name without one changes nothing."""
        if name not in self._states:
            return
        state, on_device = self._states[name]
        torch.set_rng_state(state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device)

    @contextmanager
    def replaying(self, name: object) -> Iterator[None]:
        """While open, the numbers that were drawn from a state that was kept come again; those drawn afterwards are new ones."""
        self.record(self)
        self.replay(name)
        try:
            yield
        finally:
            self.replay(self)
