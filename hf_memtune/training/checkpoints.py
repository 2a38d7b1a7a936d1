"""Which checkpoint a run goes on from: the newest that was written to its end. One whose process was killed while it was written is passed over.

While a checkpoint is written, a file in it says so. Checkpoints of a plain Trainer have no such file; of these, and of ones that were
deleted in part, the files that have to be there tell.
"""

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_memtune.errors import ConfigError

logger = logging.getLogger(__name__)

UNFINISHED = "hf_memtune_unfinished"
_WEIGHTS = ("model", "pytorch_model", "adapter_model", "reversible_adapters")
_STATES = ("optimizer", "scheduler", "rng_state")  # whose lack transformers takes for a fresh start, without a word

_STATES_OF_DEEPSPEED = ("rng_state",)  # which keeps optimizer and scheduler in a folder of its own, global_step*


@contextmanager
def being_written(checkpoint: Path, is_writer: bool) -> Iterator[None]:
    """While open, the folder is known to be unfinished; also if the process is killed. is_writer: whether this process says so."""
    mark = checkpoint / UNFINISHED
    if is_writer:
        checkpoint.mkdir(parents=True, exist_ok=True)
        mark.touch()
    yield
    if is_writer:
        mark.unlink(missing_ok=True)


def newest_complete(folder: str | Path, weights_only: bool = False) -> str:
    """The checkpoint of `folder` with the most steps that is complete; what is passed over is said. weights_only: save_only_model.

    Raises ConfigError where there is none, with the reason for each.
    """
    checkpoint, passed = look_for(folder, weights_only)
    if checkpoint is not None:
        if passed:
            logger.warning("resuming from %s; passed over: %s.", checkpoint.name, "; ".join(passed))
        return str(checkpoint)
    found = f"none of its checkpoints is complete: {'; '.join(passed)}" if passed else "it has no checkpoint"
    raise ConfigError([f"resume_from_checkpoint: got True, but of {str(folder)!r} {found}. Leave it out to begin anew."])


def look_for(folder: str | Path, weights_only: bool = False) -> tuple[Path | None, list[str]]:
    """The complete checkpoint with the most steps, or None, and what is wrong with each that has more."""
    passed: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        why = why_incomplete(checkpoint, weights_only)
        if why is None:
            return checkpoint, passed
        passed.append(f"{checkpoint.name} ({why})")
    return None, passed


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the one with the fewest steps first."""
    named = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [path for path in named if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def resumed_from(args: TrainingArguments, wanted: str | bool | None) -> Path | None:
    """The checkpoint that is gone on from: the one that is named, or for True the newest that is whole; None where there is none."""
    if wanted is True:
        return look_for(args.output_dir, args.save_only_model)[0]
    return Path(wanted) if wanted else None


def progress_of(checkpoint: Path) -> TrainerState:
    """What was done when a complete checkpoint was written: global_step, epoch (None where that was not written) and max_steps among it."""
    saved = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    known = {each.name for each in fields(TrainerState)}
    return TrainerState(**{name: value for name, value in saved.items() if name in known})  # that of another version may have more


def require_complete(checkpoint: str | Path, weights_only: bool = False) -> None:
    """Raises ConfigError where a folder that was named is no whole checkpoint."""
    if not Path(checkpoint).is_dir():
        raise ConfigError([f"resume_from_checkpoint: got {str(checkpoint)!r}, which is no folder."])
    if (why := why_incomplete(Path(checkpoint), weights_only)) is not None:
        raise ConfigError(
            [
                f"resume_from_checkpoint: got {str(checkpoint)!r}, which is not whole: {why}. What a run learned from it would not be what it would have "
                "learned undisturbed. Name another one, or True for the newest that is whole."
            ]
        )


_OF_LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # what adapters do, by


def require_same_model(checkpoint: str | Path, model: nn.Module) -> None:
    """Raises ConfigError where a checkpoint is of another kind of model: transformers would load what has the same names, and go on.

    Told by the class that its config names, or by the kind of task of its LoRA adapters.
    """
    classes = [kind.__name__ for kind in type(model).__mro__]  # FSDP2 makes one of its own of the model's
    tasks = [config.task_type for config in (getattr(model, "peft_config", None) or {}).values()]
    for name, key, expected in (("config.json", "architectures", classes), ("adapter_config.json", "task_type", tasks)):
        file = Path(checkpoint) / name
        saved = json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None
        got = saved[0] if isinstance(saved, list) and saved else saved
        if got and any(expected) and got not in expected:
            raise ConfigError(
                [
                    f"resume_from_checkpoint: {str(checkpoint)!r} is another run's: of {got}, expected {expected[0]}. Name a checkpoint of this run, "
                    "or leave it out, with an output_dir of its own."
                ]
            )
    _require_same_lora(Path(checkpoint), model)


def _require_same_lora(checkpoint: Path, model: nn.Module) -> None:
    """Raises ConfigError where adapters of other sizes, places or scaling were saved: those of another scaling would be loaded, and be others."""
    configs, file = list((getattr(model, "peft_config", None) or {}).values()), checkpoint / "adapter_config.json"
    if len(configs) != 1 or not file.is_file():
        return
    saved, found = json.loads(file.read_text(encoding="utf-8")), []
    for name in _OF_LORA:
        had, has = (_plain(value) for value in (saved.get(name), getattr(configs[0], name, None)))
        if name in saved and had != has:
            found.append("other modules" if isinstance(had, set) or isinstance(has, set) else f"{name}={had}, expected {has}")
    if found:
        wrong = f"the LoRA adapters in {str(checkpoint)!r} have {', '.join(found)}"
        raise ConfigError(
            [f"resume_from_checkpoint: {wrong}. Give the settings of that run, or leave it out, with an output_dir of its own."]
        )


def _plain(value):
    """Lists of names in any order."""
    return set(value) if isinstance(value, (list, tuple, set)) else value


def why_incomplete(checkpoint: Path, weights_only: bool = False) -> str | None:
    """What shows that a checkpoint was not written to its end, or None. The state of the trainer is written last."""
    state = checkpoint / TRAINER_STATE_NAME
    if (checkpoint / UNFINISHED).exists():
        return "it was being written when its process ended"
    if not state.is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    names = [path.name for path in checkpoint.iterdir()]
    if not any(name.startswith(_WEIGHTS) and not name.endswith((".json", ".md")) for name in names):
        return "weights are missing"
    wanted = () if weights_only else _STATES_OF_DEEPSPEED if any(name.startswith("global_step") for name in names) else _STATES
    lacking = [state for state in wanted if not any(name.startswith(state) for name in names)]
    if lacking:
        return f"{', '.join(lacking)} missing"
    cut = [path.name for path in sorted(checkpoint.iterdir()) if _is_cut_off(path)]
    return f"{', '.join(cut)} cut off" if cut else None


def _is_cut_off(path: Path) -> bool:
    """Of files that tell: safetensors know their length, and what torch saves is an archive whose list of contents is at its end."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return False
        except (SafetensorError, OSError):
            return True
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)
