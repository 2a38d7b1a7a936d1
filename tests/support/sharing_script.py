"""One step on rows that two processes share: `accelerate launch ... sharing_script.py FOLDER`. Process 0 leaves its gradients there.

A loss is the mean over rows of the same length without padding, so that the mean over processes is the mean over rows.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support import patience  # noqa: E402
from tests.support.reversible_models import model_of, reversible_of  # noqa: E402

ROWS, TOKENS = 4, 9
# wrapper, model, coupling or another method, and settings
CASES = {
    "ddp centred": ("ddp", "bert", "centred", {}),
    "ddp meft1": ("ddp", "llama", "meft1", {}),
    "ddp meft3": ("ddp", "bart", "meft3", {}),
    "ddp all": ("ddp", "gpt2", "centred", {"adapter_rank": 0}),
    "ddp part": ("ddp", "llama", "meft1", {"reversible_layers": 2}),
    "ddp unused": ("ddp unused", "llama", "centred", {}),
    "ddp two levels": ("ddp", "llama", "two levels", {}),
    "fsdp centred": ("fsdp", "llama", "centred", {}),
    "fsdp meft3": ("fsdp", "bert", "meft3", {}),
    "fsdp all": ("fsdp", "llama", "centred", {"adapter_rank": 0}),
    "fsdp two levels": ("fsdp", "gpt2", "two levels", {}),
    "ddp streaming": ("ddp", "llama", "streaming", {"sequence_chunk_size": 4}),
    "ddp unused streaming": ("ddp unused", "llama", "streaming", {"sequence_chunk_size": 4}),
    "ddp streaming tied": ("ddp", "gpt2", "streaming", {"sequence_chunk_size": 4}),
    "ddp streaming accumulated": ("ddp accumulated", "llama", "streaming", {"sequence_chunk_size": 4}),
    "ddp seeking": ("ddp", "llama", "seeking", {"token_ratio": 0.5}),
    "ddp seeking in a stream": ("ddp", "llama", "seeking", {"token_ratio": 0.5, "token_gradient": "stream", "sequence_chunk_size": 4}),
}


def wrapped(kind: str, model: nn.Module, handle) -> nn.Module:
    if kind.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "ddp unused")
    from torch.distributed.fsdp import fully_shard

    for stack in handle.stacks:
        for layer in stack.layers:
            fully_shard(layer)
    return fully_shard(model)


def gradients(name: str, share: slice, processes: int) -> dict:
    """Of the mean loss over this process's rows, averaged over processes by the wrapper."""
    kind, architecture, method, changed = CASES[name]
    model = model_of(architecture)
    torch.manual_seed(2)
    handle = put_on(model, method, changed)
    ids = torch.randint(5, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))[share]
    training = wrapped(kind, model, handle) if processes > 1 else model
    for _ in range(2 if kind == "ddp accumulated" else 1):  # the second time there are gradients, already averaged
        training(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in found.items()}


def put_on(model: nn.Module, method: str, changed: dict):
    from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, checkpoint_in_two_levels

    if method == "two levels":
        return checkpoint_in_two_levels(model)
    if method == "streaming":
        return Streaming(model, StreamingConfig(**changed))
    if method == "seeking":  # of as many labels in every row, chosen row by row
        rowwise = {"token_scorer": "context", "token_selection": "top", "select_from": "labels", "always_keep": "none"}
        return TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **rowwise, **changed))
    return reversible_of(model, method, "exact", **changed)


def main(folder: Path) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=True, timeout=timedelta(seconds=patience.COLLECTIVE))
    half, rank = ROWS // 2, state.process_index
    found = {name: gradients(name, slice(rank * half, (rank + 1) * half), state.num_processes) for name in CASES}
    if rank == 0:
        torch.save(found | {"processes": state.num_processes}, folder / "found.pt")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
