"""What can be known to be wrong before anything is loaded: integrations, checkpoints, the folder of a model."""

import math
import os
from pathlib import Path

from hf_memtune.errors import ConfigError

RESUME_WORDS = {"true": True, "latest": True, "false": None, "none": None}
ADAPTERS = "adapter_config.json"
CONFIGS = ("config.json", ADAPTERS)
REVERSIBLE_CONFIG = "reversible_config.json"


def checkpoint(word: str) -> str | bool | None:
    """The value of `--resume_from_checkpoint`: a folder, or True for the latest checkpoint of output_dir."""
    return RESUME_WORDS.get(word.lower(), word)


def problems_of_resuming(training) -> list[str]:
    """A checkpoint that is asked for and is not there, or not whole."""
    from hf_memtune.training.checkpoints import look_for, require_complete

    wanted, folder = training.resume_from_checkpoint, Path(training.output_dir)
    if wanted is True:
        found, passed = look_for(folder, training.save_only_model)
        what = f"no checkpoint that is complete: {'; '.join(passed)}" if passed else "no checkpoint"
        none = f"resume_from_checkpoint: {str(folder)!r} (output_dir) holds {what}. Leave it out to begin anew."
        return _problems_of_steps(found, training) if found else [none]
    try:
        if wanted is not None:
            require_complete(wanted, training.save_only_model)
            return _problems_of_steps(Path(wanted), training)
    except ConfigError as error:
        return error.problems
    return []


def _problems_of_steps(found: Path, training) -> list[str]:
    """A checkpoint after which nothing is left to train, such as that of a longer run in the same folder."""
    from hf_memtune.training.checkpoints import progress_of

    counts_steps = training.max_steps > 0
    setting, wanted = ("max_steps", training.max_steps) if counts_steps else ("num_train_epochs", training.num_train_epochs)
    state = progress_of(found)
    done, had_all = (state.global_step if counts_steps else state.epoch), state.global_step >= state.max_steps
    if done is None or done < wanted or (not counts_steps and done < math.ceil(wanted) and not had_all):
        return []
    wrong = f"{str(found)!r} is of {'step' if counts_steps else 'epoch'} {done:g}, and {setting} is {wanted:g}, so nothing is left to train"
    return [f"resume_from_checkpoint: {wrong}. Raise {setting}, or name the checkpoint of another run, or another output_dir."]


def warnings_of_other_runs(training) -> list[str]:
    """Checkpoints of an earlier run, where this one begins anew."""
    from hf_memtune.training.checkpoints import checkpoints_in

    there = [checkpoint.name for checkpoint in checkpoints_in(training.output_dir)]
    if not there or training.resume_from_checkpoint is not None or training.save_strategy == "no":
        return []
    return [
        f"output_dir: {training.output_dir!r} holds {', '.join(there)} of an earlier run, and this one begins anew: it writes its own among them, "
        "and resume_from_checkpoint without a name would take the one with the most steps. Name another output_dir, or resume."
    ]


def idle_epochs(training, given) -> dict[str, str]:
    """Epochs beside steps, by which transformers goes alone; with the reason. given: names of settings that were given."""
    is_idle = training is not None and training.max_steps > 0 and "num_train_epochs" in given
    return {"num_train_epochs": f"with max_steps={training.max_steps}"} if is_idle else {}


def problems_of_scores(data, training) -> list[str]:
    """Scores made before training are found by row, and of packed rows a batch is one."""
    if not getattr(data, "packing", False) or not training.token_seeking or training.seek_schedule == "step":
        return []
    wrong = f"got {training.seek_schedule!r} with packing, which makes one row of a batch: scores made before training are found by row"
    return [f"seek_schedule: {wrong}. Set seek_schedule=step, or leave packing out."]


def problems_of_reports(training) -> list[str]:
    """Integrations of `--report_to` that transformers does not know, or whose package is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    installed, found = get_available_reporting_integrations(), []
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            found.append(f"report_to: got {name!r}, expected none, all, or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
        elif name not in (*installed, "flyte"):  # flyte is never listed as installed: it has no package to look for
            found.append(f"report_to: got {name!r}, whose package is not installed. Install it, or leave it out.")
    return found


def problems_of_optimizer(training) -> list[str]:
    """An optimizer whose package is not installed, which transformers would say after data and model are loaded."""
    from importlib.util import find_spec

    from hf_memtune.levers.facts import optimizer_name

    name = optimizer_name(training)
    is_of_bitsandbytes = name == "adamw_8bit" or "bnb" in name or name.startswith(("paged", "lion", "ademamix"))
    if not is_of_bitsandbytes or find_spec("bitsandbytes"):
        return []
    return [f"optim: got {name!r}, which needs bitsandbytes; pip install -e '.[quantization]', or leave it out."]


def problems_of_folder(name: str, reversible_adapters: str | None) -> list[str]:
    """A path that is no folder, or is a folder without a model, or of another one than is asked for. Other names are the hub's, which is
    asked later."""
    path = Path(name)
    if path.is_dir():
        if (path / ADAPTERS).is_file() and (path / REVERSIBLE_CONFIG).is_file() and reversible_adapters is None:
            wrong = (
                f"the LoRA adapters in {name!r} were trained inside reversible layers, and fit no others; reversible_adapters is not given"
            )
            return [f"model_name_or_path: {wrong}. Name the folder twice: --model {name} --reversible_adapters {name}."]
        if any((path / config).is_file() for config in CONFIGS):
            return []
        if (path / REVERSIBLE_CONFIG).is_file():
            remedy = f"Name the model they were trained on, and --reversible_adapters {name}"
            return [f"model_name_or_path: the folder {name!r} holds adapters of reversible layers, and no model. {remedy}."]
        return [f"model_name_or_path: the folder {name!r} holds no model (it has no {' or '.join(CONFIGS)})."]
    if path.is_file():
        return [f"model_name_or_path: {name!r} is a file, expected the folder of a model, or a hub name."]
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:  # a hub name is NAME or OWNER/NAME
        return [f"model_name_or_path: there is no folder {name!r}."]
    return []


def why_unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which may have to be made; None where nothing speaks against it. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{str(there)!r} is no folder"
    # where root may do anything, and nothing can be made
    made_up = {os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.ismount(path)}
    if not os.access(there, os.W_OK | os.X_OK) or there.stat().st_dev in made_up:
        return f"nothing can be written into {str(there)!r}"
    return None


def problems_of_output(model, training) -> list[str]:
    """An output_dir that is no folder, or cannot be one, that is the model's own, or that holds a model of another kind: whoever loads it would get that one, or both."""
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"output_dir: {training.output_dir!r} is a file, expected a folder. Name another one."]
    if (why := why_unwritable(folder)) is not None:
        return [f"output_dir: got {training.output_dir!r}, and {why}. Name another one."]
    source = Path(model.model_name_or_path or "")
    if model.model_name_or_path and source.is_dir() and folder.is_dir() and folder.samefile(source):
        wrong = f"{training.output_dir!r} is the folder of the model that is trained, whose files would be changed"
        return [f"output_dir: {wrong}. Name another one."]
    is_reversible = training.is_reversible or model.reversible_adapters is not None
    is_whole = not model.lora_r and (not is_reversible or training.adapter_rank == 0)
    kinds = {ADAPTERS: model.lora_r, REVERSIBLE_CONFIG: is_reversible, "config.json": is_whole}
    written = {name for name, is_written in kinds.items() if is_written}
    other = [name for name in (*CONFIGS, REVERSIBLE_CONFIG) if name not in written and (folder / name).is_file()]
    if not other:
        return []
    wrong = f"{training.output_dir!r} holds what another kind of run has saved ({', '.join(other)}), which would be loaded with, or in place of, this one"
    return [f"output_dir: {wrong}. Name another one, or remove what is in it."]


def problems_of_adapters(model, training) -> list[str]:
    """A checkpoint with LoRA adapters for a run without, or without them for one that trains them."""
    from hf_memtune.training.checkpoints import resumed_from

    found = resumed_from(training, training.resume_from_checkpoint)
    if not found or not found.is_dir() or (found / ADAPTERS).is_file() == bool(model.lora_r):
        return []
    got, remedy = ("no LoRA adapters", "leave lora_r out") if model.lora_r else ("LoRA adapters", "give the lora_r of that run")
    return [f"resume_from_checkpoint: {str(found)!r} has {got}, and lora_r is {model.lora_r}. To go on with it {remedy}."]


def problems_of_trained(name: str) -> list[str]:
    """A folder of LoRA adapters, named as the model to train: what is trained would replace them, or leave them as they are."""
    folder = Path(name)
    if not (folder / ADAPTERS).is_file():
        return []
    resumed = "go on with the run that wrote them, by its own command and --resume_from_checkpoint"
    remedy = f"To train from them, merge them first (hf-memtune merge --model {name} --output_dir MERGED), and train MERGED; or {resumed}"
    if (folder / REVERSIBLE_CONFIG).is_file():  # these cannot be merged
        remedy = resumed[0].upper() + resumed[1:]
    wrong = f"the folder {name!r} holds LoRA adapters ({ADAPTERS}), expected a whole model: they would not be trained further"
    return [f"model_name_or_path: {wrong}. {remedy}."]
