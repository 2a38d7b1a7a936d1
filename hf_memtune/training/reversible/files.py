"""Files of reversible layers: adapters and trained head as safetensors, and beside them what they were trained on, as JSON.

    handle = load_reversible(model, folder)  # model: the one they were trained on, as it was then
    handle.model.generate(...)

The adapters act inside a coupling that the plain model does not have, so they cannot be merged into its weights: whoever uses them
needs this library.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_memtune import __version__, files
from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.methods.reversible.adapters import is_put_aside
from hf_memtune.methods.reversible.handle import ReversibleHandle, make_reversible
from hf_memtune.settings.protocol import told
from hf_memtune.settings.reversible import ReversibleConfig
from hf_memtune.training.fingerprint import Marks, parameter_marks, same_marks

WEIGHTS, SETTINGS = "reversible_adapters.safetensors", "reversible_config.json"
PEFT_CONFIG = "adapter_config.json"
FORMAT = 1
_KNOWN: WeakKeyDictionary[ReversibleHandle, tuple[list, Marks]] = WeakKeyDictionary()  # a checkpoint should not read the whole model
# what may differ between a run and the one that resumes it: none of it decides what the model computes
_FREE = ("adapter_init_std", "adapter_dropout", "train_head")


def save_reversible(handle: ReversibleHandle, folder: str | Path) -> None:
    """Write what the handle trains, and the settings of its layers, into a folder. A few megabytes; the model itself is not in it."""
    folder = Path(folder)
    with files.whole(folder / WEIGHTS) as partial:
        save_file({name: value.cpu().contiguous().clone() for name, value in handle.trained.items()}, partial)
    described = _described(handle) | {"digest": files.digest_of(folder / WEIGHTS)}  # last, so that they belong together
    files.write_text(folder / SETTINGS, json.dumps(described, indent=1) + "\n")


def load_reversible(model: nn.Module, folder: str | Path) -> ReversibleHandle:
    """Make `model` reversible as the one whose layers were saved in `folder`, and put in what was trained.

    model: the base model, a transformers model, or a PEFT model around it if that is what was trained. The model is left in its mode,
    training or evaluation. For further training: MemEfficientTrainer(model=model, reversible=handle, ...).
    Raises MemTuneError, with the model as it was, where the base model is another one or a file is missing, broken or incomplete.
    """
    saved = _read(Path(folder))
    _require_lora(model, Path(folder))
    _require_base(model, saved["base"], Path(folder))
    try:
        with told():  # when they were trained
            config = ReversibleConfig(**saved["settings"])
        handle = make_reversible(model, config)
    except (TypeError, ConfigError) as error:  # of another version of this library
        raise MemTuneError(f"{Path(folder, SETTINGS)}: its settings cannot be used here: {error}") from error
    try:
        _put_in(handle, Path(folder), saved.get("digest"))
    except BaseException:
        handle.restore()
        raise
    return handle


def load_into(handle: ReversibleHandle, folder: str | Path) -> None:
    """Put what was saved in `folder` into layers that are reversible in the same way. Raises MemTuneError, with nothing changed."""
    saved = _read(Path(folder))
    ours = _settings(handle)
    wrong = [name for name in ours if name not in _FREE and saved["settings"].get(name) != ours[name]]
    if wrong:
        found = ", ".join(f"{name}: got {ours[name]}, expected {saved['settings'].get(name)}" for name in wrong)
        raise MemTuneError(f"{folder} was trained with other settings of its reversible layers: {found}.")
    _require_base(handle.model, saved["base"], Path(folder))
    _put_in(handle, Path(folder), saved.get("digest"))


def is_saved_reversible(folder: str | Path) -> bool:
    """Whether reversible layers were saved in this folder."""
    return Path(folder, SETTINGS).is_file()


def _described(handle: ReversibleHandle) -> dict[str, Any]:
    head_model = unwrapped(handle.model)
    base = {
        "name_or_path": getattr(head_model.config, "_name_or_path", "") or None,
        "class": type(head_model).__name__,
        "parameters": _base_marks(handle),
    }
    versions = {"hf_memtune": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    return {"format": FORMAT, "settings": _settings(handle), "versions": versions, "base": base}


def _base_marks(handle: ReversibleHandle) -> Marks:
    """Of all that is not trained here, and not saved elsewhere, as LoRA is. Read once, as long as nothing writes to it."""
    trained = handle.trained
    frozen = {
        name: p for name, p in unwrapped(handle.model).named_parameters() if not (p.requires_grad or name in trained or is_put_aside(name))
    }
    state = [(name, p.data_ptr(), p._version) for name, p in frozen.items()]
    if _KNOWN.get(handle, (None,))[0] != state:
        _KNOWN[handle] = (state, parameter_marks(frozen))
    return _KNOWN[handle][1]


def _settings(handle: ReversibleHandle) -> dict[str, Any]:
    """With the fixed-point format that the model decided on, so that another default changes nothing of what was trained."""
    bits = {shared.fraction_bits for shared in handle.shared}
    return asdict(handle.config) | ({"reversible_fraction_bits": bits.pop()} if len(bits) == 1 else {})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise MemTuneError(f"{folder}: no reversible layers were saved here: {SETTINGS} is missing. Expected the folder of a checkpoint.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        known = saved["format"] == FORMAT and all(isinstance(saved[name], dict) for name in ("settings", "base"))
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MemTuneError(f"{path}: cannot be read ({reason}). It is broken or cut off; take another copy.") from error
    if not known:
        raise MemTuneError(f"{path}: got format {saved['format']!r}, expected {FORMAT}. It is of another version of hf_memtune.")
    return saved


def _put_in(handle: ReversibleHandle, folder: Path, digest: str | None) -> None:
    """digest: of the file when it was saved; None: saved before digests were."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise MemTuneError(f"{folder}: {WEIGHTS} is missing, though {SETTINGS} is there.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MemTuneError(f"{path}: cannot be read ({error}). It is broken or cut off; take another copy.") from error
    if digest is not None and files.digest_of(path) != digest:
        raise MemTuneError(
            f"{path}: it is not the file that was saved with {SETTINGS}: it was changed since, or is of another save, such as one that was cut "
            "short. Take another checkpoint, or another copy."
        )
    try:
        handle.load({name: tensor for name, tensor in state.items() if not is_put_aside(name)})  # older folders have these
    except MemTuneError as error:
        raise MemTuneError(f"{path}: {error}") from error


def _require_lora(model: nn.Module, folder: Path) -> None:
    """Refuse a model without the LoRA that was trained inside the reversible layers: it would run as the base model, coupled."""
    is_adapted = model is not unwrapped(model) or getattr(model, "_hf_peft_config_loaded", False)
    if (folder / PEFT_CONFIG).is_file() and not is_adapted:
        raise MemTuneError(
            f"{folder}: PEFT adapters were trained inside these reversible layers ({PEFT_CONFIG} is there), but the model has none. Load "
            "them first: PeftModel.from_pretrained(model, folder). On the command line, to evaluate or generate, name this folder as "
            "model_name_or_path too."
        )


def _require_base(model: nn.Module, base: dict[str, Any], folder: Path) -> None:
    """Refuse a model that the adapters were not trained on: they would act on other states than they know."""
    wanted: Marks = {name: mark for name, mark in base["parameters"].items() if not is_put_aside(name)}  # older folders have these
    found = parameter_marks({name: p for name, p in unwrapped(model).named_parameters() if name in wanted})
    wrong = sorted(name for name in wanted if not same_marks(found.get(name), wanted[name]))
    if wrong:
        raise MemTuneError(
            f"{folder}: trained on {base['name_or_path'] or 'a model without a name'} ({base['class']}), but this is another model "
            f"({_named(model)}): {_counted(wrong, wanted)}, first {wrong[0]}: got {found.get(wrong[0])}, expected {wanted[wrong[0]]} "
            "(shape, and digest of the content). Load the model that was trained, with the weights it had then."
        )


def _named(model: nn.Module) -> str:
    head_model = unwrapped(model)
    return getattr(head_model.config, "_name_or_path", "") or type(head_model).__name__


def _counted(wrong: list[str], wanted: Iterable[str]) -> str:
    return f"{len(wrong)} of {len(list(wanted))} tensors differ"
