"""Which weights LoRA adapters are trained beside: a digest stands in every checkpoint, since a run that goes on beside others learns something else."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_memtune import files
from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.training.checkpoints import resumed_from

BASE = "base_weights.json"
_SAMPLED = 2048  # values of a tensor, at most
_ROUNDED = (torch.bfloat16, torch.float32, torch.float64)  # as which the same stored weights may be loaded


class NoteBase(TrainerCallback):
    """Writes down the frozen weights in every checkpoint. Add it after SaveFirst."""

    def __init__(self, known: dict[str, Any]):
        self.known = known

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.is_dir():
            files.write_text(folder / BASE, json.dumps(self.known, indent=1) + "\n")


def note_base(trainer, resumed: str | bool | None) -> None:
    """Have checkpoints of LoRA adapters say which weights these are for; warn where a run that is resumed has others."""
    if not trainer.is_world_process_zero() or not getattr(trainer.model, "peft_config", None):
        return
    now = known_base(trainer.model)
    trainer.add_callback(NoteBase(now))
    folder = resumed_from(trainer.args, resumed)
    file = folder / BASE if folder else None
    then = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else None
    if then is not None and then["formats"] == now["formats"] and then["digest"] != now["digest"]:
        warnings.warn(
            f"resume_from_checkpoint: the LoRA adapters in {str(folder)!r} were trained beside the weights of {then['name']!r}, and those of "
            f"{now['name']!r}, as they are now, are others: the adapters do not fit them. Name the model of that run (--model), with the weights "
            "that it had then; or leave resume_from_checkpoint out, with an output_dir of its own.",
            stacklevel=3,
        )


def known_base(model: nn.Module) -> dict[str, Any]:
    """The name of the model, and a digest over names, shapes and some values of what is frozen. formats: others cannot be compared."""
    digest, formats = hashlib.blake2b(digest_size=16), set()
    inner = unwrapped(model)
    for name, parameter in sorted(inner.named_parameters()):
        if parameter.requires_grad or ".original_module." in name:  # of a head that is trained, random beforehand
            continue
        values, kind = _sample(parameter.data)
        formats.add(kind)
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        digest.update(values.cpu().numpy())
    return {"name": inner.config._name_or_path, "formats": sorted(formats), "digest": digest.hexdigest()}


def _sample(tensor: Tensor) -> tuple[Tensor, str]:
    """Values from all over a tensor, as bytes, and their format: one for all that are equal once they are rounded to bfloat16. Of classes of tensors
    that hold their values in ways of their own, none."""
    if type(tensor) is not Tensor:
        return torch.empty(0), type(tensor).__name__
    values = tensor.reshape(-1)[:: max(1, -(-tensor.numel() // _SAMPLED))].contiguous()
    if tensor.dtype in _ROUNDED:
        return values.to(torch.bfloat16).view(torch.uint8), "bfloat16"
    return values.view(torch.uint8), f"{str(tensor.dtype).removeprefix('torch.')} of {tensor.device.type}"
