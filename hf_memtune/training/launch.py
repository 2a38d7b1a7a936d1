"""How processes were launched, and what of it a lever cannot work with."""

from typing import Any

from hf_memtune.errors import UnsupportedModelError
from hf_memtune.levers.lever import Lever
from hf_memtune.levers.table import refusals
from hf_memtune.methods.streaming.sharded import require_known_fsdp
from hf_memtune.training.running import RunningTrainer


def problems_of(args: Any, lever: Lever) -> list[str]:
    """What of the arguments of any Trainer the lever does not support, one message each."""
    return refusals(lever, args) + problems_of_devices(args, lever)


def problems_of_devices(args: Any, lever: Lever) -> list[str]:
    """Several devices in one process."""
    if args.n_gpu <= 1:
        return []
    return [
        f"{args.n_gpu} GPUs in one process (DataParallel): {lever.name} runs one process per GPU. Launch with `accelerate launch`, or set "
        "CUDA_VISIBLE_DEVICES to one GPU."
    ]


def problems_of_launch(trainer: RunningTrainer, lever: Lever) -> list[str]:
    """How accelerate was configured, which only a trainer knows."""
    sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if sharded or trainer.is_deepspeed_enabled or max(trainer.get_tp_size(), trainer.get_cp_size()) > 1:
        return [
            f"accelerate is configured for DeepSpeed or tensor parallelism, or the model was loaded sharded, which {lever.name} does not "
            "support. Launch with plain data parallelism (accelerate launch --multi_gpu)."
        ]
    if not trainer.is_fsdp_enabled:
        return []
    if lever.fsdp2 and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", None) == 2:
        return _problems_of_fsdp2()
    return [f"accelerate is configured for FSDP, which {lever.name} does not support: {lever.sharded}."]


def _problems_of_fsdp2() -> list[str]:
    try:
        require_known_fsdp()
    except UnsupportedModelError as error:
        return [str(error)]
    return []
