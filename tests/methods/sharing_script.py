"""One step on rows that two processes share: `python sharing_script.py FOLDER RANK`. Process 0 leaves its gradients there.

A loss is the mean over rows of the same length without padding, so that the mean over processes is the mean over rows.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.methods.reversible_models import model_of, reversible_of  # noqa: E402

ROWS, TOKENS = 4, 9
# wrapper, model, coupling or "two levels", and settings
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
    kind, architecture, coupling, changed = CASES[name]
    model = model_of(architecture)
    torch.manual_seed(2)
    handle = two_levels(model) if coupling == "two levels" else reversible_of(model, coupling, "exact", **changed)
    ids = torch.randint(5, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))[share]
    training = wrapped(kind, model, handle) if processes > 1 else model
    training(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in found.items()}


def two_levels(model):
    from hf_memtune import checkpoint_in_two_levels

    return checkpoint_in_two_levels(model)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    half = ROWS // 2
    found = {name: gradients(name, slice(rank * half, (rank + 1) * half), 2) for name in CASES}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1")
    main(Path(sys.argv[1]), int(sys.argv[2]))
