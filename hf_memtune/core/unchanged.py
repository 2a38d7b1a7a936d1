"""What a call has read, and what runs it again in backward reads again: it has to be the same, or the gradient is that of another function.

Plain autograd keeps what forward computed, and looks at the versions of the tensors that it saved. So does this, of all that a call reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_memtune._compat import buffers_are_copied, caches_parametrizations
from hf_memtune.core.fingerprint import Fingerprint
from hf_memtune.core.places import places_of
from hf_memtune.errors import InverseError, MemTuneError

Versions = list[tuple[str, Tensor, int]]
"""Tensors, what they are called, and how often they had been changed in place."""


class Unchanged:
    """The state of `module` and of the arguments of one call. Made before the call runs; `settle` after it; `check` before each run again.

    name: of the model, in messages.
    """

    def __init__(self, module: nn.Module, name: str):
        self._module, self._name = module, name
        self._require_made_anew()
        self._own = _versions_of((key, tensor) for _, key, tensor in places_of(module))

    def settle(self, given: Mapping[str, Any]) -> None:
        """After the call. given: its arguments by name. What it changes itself (statistics, rows looked up with max_norm) is let be."""
        own, self._own = self._own, []
        kept = [each for each in own if each[1]._version == each[2]]
        self._trained = [each for each in kept if each[1].requires_grad]
        self._buffers = [each for each in kept if not each[1].requires_grad and not isinstance(each[1], nn.Parameter)]
        if buffers_are_copied():
            self._buffers = []
        self._inputs = _versions_of(
            (name, leaf) for name, value in given.items() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)
        )
        self._fingerprint = Fingerprint(self._module)
        self._fingerprint.forget({id(tensor) for _, tensor, version in own if tensor._version != version})

    def check(self) -> None:
        """Raises InverseError, a MemTuneError, where anything differs from what it was when the call was over."""
        self._require_made_anew()
        if changed := _changed(self._trained, self._module):
            raise InverseError(
                f"{self._name}: {changed} was changed in place between a call and its backward, which runs the call again. Take the "
                "optimizer's step after backward."
            )
        self._fingerprint.check()
        if changed := _changed(self._inputs):
            raise InverseError(
                f"{self._name}: {changed} was changed in place between a call and its backward, which reads it again, chunk by chunk. Give the "
                f"call a copy of it ({changed}.clone()), or write into it after backward."
            )
        if changed := _changed(self._buffers, self._module):
            raise InverseError(
                f"{self._name}: its buffer {changed} was changed in place between a call and its backward, which runs the call again. Change it "
                "before the call, or after backward."
            )

    def _require_made_anew(self) -> None:
        if caches_parametrizations(self._module):
            raise MemTuneError(
                f"{self._name}: its weights are parametrized, and this runs inside of torch.nn.utils.parametrize.cached(), which would give the passes "
                "with gradient what a pass without gradient has made of them, so that they learn nothing. Call the model, and go backward, outside of "
                "cached()."
            )


def _versions_of(named: Iterable[tuple[str, Tensor]]) -> Versions:
    return [(name, tensor, tensor._version) for name, tensor in named if not tensor.is_inference()]  # these count no changes


def _changed(versions: Versions, within: nn.Module | None = None) -> str | None:
    """The name of the first that was changed, in the module that it stands in, if there is one."""
    for name, tensor, version in versions:
        if tensor._version != version:
            there = [] if within is None else [*within.named_parameters(), *within.named_buffers()]
            return next((long for long, other in there if other is tensor), name)
    return None
