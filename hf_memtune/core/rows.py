"""A tensor of whole rows that is written and read in parts, on the device or at home in host memory."""

import torch
from torch import Tensor

from hf_memtune.core.offload import HostMemory, HostTensor, heads_first


class RowTensor:
    """(B, T, D), of the rows, width, dtype and device of `like`, (B, some, D), and of T = `length` tokens.

    host: where it is at home; None: on the device, allocated once.
    """

    def __init__(self, like: Tensor, length: int, host: HostMemory | None = None):
        self._home = HostTensor(host, like[:, None], length) if host is not None else None
        self._whole = like.new_empty(like.shape[0], length, like.shape[2]) if host is None else None

    @torch.no_grad()
    def put(self, part: Tensor, start: int) -> None:
        """Write (B, S, D) from token `start` on."""
        if self._home is not None:
            self._home.send(part.detach()[:, None], start)
            return
        self._part(start, part.shape[1]).copy_(part)

    def get(self, start: int, count: int) -> Tensor:
        """Tokens [start, start + count), detached and contiguous: of one row on the device, the memory itself."""
        return self._read(start, count).contiguous()

    def copy(self, start: int, count: int) -> Tensor:
        """The same, to be changed by whoever takes it."""
        part = self._read(start, count)
        return part.clone(memory_format=torch.contiguous_format) if self._home is None else part.contiguous()

    def tensors(self) -> list[Tensor]:
        """What is kept on the device."""
        return [] if self._whole is None else [self._whole]

    def _read(self, start: int, count: int) -> Tensor:
        return self._part(start, count) if self._home is None else heads_first(self._home.fetch(start, start + count).ready())[:, 0]

    def _part(self, start: int, count: int) -> Tensor:
        assert self._whole is not None
        return self._whole.narrow(1, start, count).detach()
