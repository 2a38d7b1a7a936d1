"""What attention gave in forward, kept for backward: of a layer that runs again, the one part whose time grows with the square of the row.

Backward of attention needs its output and the lse of its queries (see `core.attention_kernels`), and not its weights: with both at hand, a
layer that is computed again leaves its attention out. It is the trade of selective activation checkpointing: bytes of one more hidden
state a layer, against the time of one attention forward.

Shape legend: B rows, H query heads, T tokens in a row, S queries of a chunk, C channels of a head's output.
"""

from torch import Tensor

from hf_memtune.core.attention_kernels import Attended
from hf_memtune.core.offload import HostMemory
from hf_memtune.core.rows import RowTensor


class KeptAttention:
    """Outputs, (B, H, T, C), and lse, (B, H, T), of attention modules, written in chunks of tokens from the first on.

    host: where they are at home; None: on the device. left_out: modules whose attention could not be kept.
    """

    def __init__(self, host: HostMemory | None = None):
        self._host = host
        self.left_out: set[int] = set()
        self._parts: dict[int, tuple[RowTensor, RowTensor]] = {}
        self._written: dict[int, int] = {}  # tokens of each module that are there

    def put(self, key: int, found: Attended, start: int, length: int) -> None:
        """Keep a chunk's attention, of the queries from token `start` on, in a row of `length` tokens."""
        output, lse = found.output.transpose(1, 2).flatten(2), found.lse.transpose(1, 2)
        if key not in self._parts:
            self._parts[key] = RowTensor(output, length, self._host), RowTensor(lse, length, self._host)
        for kept, part in zip(self._parts[key], (output, lse)):
            kept.put(part, start)
        self._written[key] = start + output.shape[1]

    def get(self, key: int, start: int, count: int) -> Attended | None:
        """That of the tokens [start, start + count), a copy that may be changed; None where it was not kept."""
        if start + count > self._written.get(key, 0):
            return None
        output, lse = (kept.copy(start, count) for kept in self._parts[key])
        return Attended(output.unflatten(2, (lse.shape[2], -1)).transpose(1, 2), lse.transpose(1, 2).contiguous())

    def drop(self, key: int) -> None:
        """Forget a module, if it is there."""
        self._parts.pop(key, None)
        self._written.pop(key, None)

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def tensors(self) -> list[Tensor]:
        """What is kept on the device."""
        return [tensor for pair in self._parts.values() for kept in pair for tensor in kept.tensors()]
