"""Which checkpoint a run goes on from: the newest that was written to its end. One whose process was killed while it was written is passed over."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_memtune.errors import ConfigError

logger = logging.getLogger(__name__)


def newest_complete(folder: str | Path) -> str:
    """The checkpoint of `folder` with the most steps that is complete; what is passed over is said.

    Raises ConfigError where there is none, with the reason for each.
    """
    passed = []
    for checkpoint in sorted(_checkpoints(Path(folder)), key=_steps, reverse=True):
        why = why_incomplete(checkpoint)
        if why is None:
            if passed:
                logger.warning("resuming from %s; passed over: %s.", checkpoint.name, "; ".join(passed))
            return str(checkpoint)
        passed.append(f"{checkpoint.name} ({why})")
    found = f"none of its checkpoints is complete: {'; '.join(passed)}" if passed else "it has no checkpoint"
    raise ConfigError([f"resume_from_checkpoint: got True, but of {str(folder)!r} {found}. Leave it out to begin anew."])


def _checkpoints(folder: Path) -> list[Path]:
    named = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in named if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def why_incomplete(checkpoint: Path) -> str | None:
    """What shows that a checkpoint was not written to its end, or None. The state of the trainer is written last."""
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
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
