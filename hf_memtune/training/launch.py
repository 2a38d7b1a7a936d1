"""How processes were launched, and what of the training arguments a method cannot work with."""

import json
from typing import Any

from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.streaming.sharded import require_known_fsdp

_DATA_PARALLEL = "use plain data parallelism (accelerate launch --multi_gpu)"
_STREAMING = "sequence_chunk_size"  # the switch of exact streaming, the one method that works with FSDP2
_FSDP1 = (
    "version 1 reduces a gradient, and frees it, as soon as one chunk has found its part of it; set fsdp_version to 2 (accelerate to-fsdp2 "
    f"rewrites a config), or {_DATA_PARALLEL}"
)
_FSDP_SEEKING = (
    "each process runs as many passes as its own tokens need, and single layers by themselves to score them, while FSDP gathers "
    f"parameters in all processes in step; use sequence_chunk_size without token_seeking, which works with FSDP2, or {_DATA_PARALLEL}"
)
UNSUPPORTED = {
    "deepspeed": f"it keeps parameters and gradients in ways of its own, under which no method has been shown to be exact; {_DATA_PARALLEL}",
    "fsdp": _FSDP_SEEKING,
    "parallelism_config": _DATA_PARALLEL,
    "torch_compile": "leave it out: compiled code would keep the model's own forward, or be compiled anew for every chunk",
    "use_liger_kernel": "leave it out: the head and its loss are fused here, and its kernels have not been shown to be exact in chunks",
    "neftune_noise_alpha": "leave it out: its noise is scaled by the number of tokens that run at a time, which is another one in chunks",
}


def problems_of(args: Any, switch: str) -> list[str]:
    """What of the arguments of any Trainer the method that `switch` turns on does not support, one message each."""
    return unsupported(args, switch) + problems_of_devices(args, switch)


def unsupported(args: Any, switch: str) -> list[str]:
    """Arguments, which need not have been set up yet, under which the method has not been shown to be exact."""
    remedies = dict(UNSUPPORTED)
    if switch == _STREAMING:
        remedies["fsdp"] = _FSDP1
        if _fsdp_version(args) == 2:
            del remedies["fsdp"]
    return [
        f"{name}: got {getattr(args, name)!r} with {switch}, which does not support it; {remedy}."
        for name, remedy in remedies.items()
        if getattr(args, name, None)
    ]


def _fsdp_version(args: Any) -> int | None:
    """The version that the arguments ask for, as transformers reads them: 2 where they do not say; None for that of XLA."""
    config = getattr(args, "fsdp_config", None) or {}
    if isinstance(config, str):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
    return None if config.get("xla") else int(config.get("version", config.get("fsdp_version", 2)))


def problems_of_devices(args: Any, switch: str) -> list[str]:
    """Several devices in one process."""
    if args.n_gpu <= 1:
        return []
    return [
        f"{args.n_gpu} GPUs in one process (DataParallel): {switch} runs one process per GPU. Launch with `accelerate launch`, or set "
        "CUDA_VISIBLE_DEVICES to one GPU."
    ]


def problems_of_launch(trainer: Any, switch: str, why: str = "") -> list[str]:
    """How accelerate was configured, which only a trainer knows. why: the reason for refusing sharded models."""
    sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if sharded or trainer.is_deepspeed_enabled or max(trainer.get_tp_size(), trainer.get_cp_size()) > 1:
        return [
            f"accelerate is configured for DeepSpeed or tensor parallelism, or the model was loaded sharded, which {switch} does not "
            f"support{why}. Launch with plain data parallelism (accelerate launch --multi_gpu)."
        ]
    if not trainer.is_fsdp_enabled:
        return []
    if switch == _STREAMING and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", None) == 2:
        return _problems_of_fsdp2()
    own = {_STREAMING: f": {_FSDP1}", "token_seeking": f": {_FSDP_SEEKING}"}.get(switch, f"{why}; {_DATA_PARALLEL}")
    return [f"accelerate is configured for FSDP, which {switch} does not support{own}."]


def _problems_of_fsdp2() -> list[str]:
    try:
        require_known_fsdp()
    except UnsupportedModelError as error:
        return [str(error)]
    return []
