"""README.md of a run: a model card in the form of the hub, with what this package knows of the run."""

from pathlib import Path

from hf_memtune.cli.summary import of_kept
from hf_memtune.files import write_text
from hf_memtune.levers.table import written_levers
from hf_memtune.units import format_bytes

MARK = "hf_memtune"  # the tag by which a card of ours is known


def write_card(settings, rows, summary) -> Path | None:
    """Write the card into output_dir. settings: those of the command; rows, summary: see cli.train.

    peft's metadata stay; its empty headings do not. A README.md of somebody else is left alone: None.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(settings.training.output_dir, "README.md")
    data = ModelCardData(library_name="transformers")
    if path.exists():
        data = ModelCard.load(path, ignore_metadata_errors=True).data
        if data.library_name != "peft" and MARK not in (data.tags or []):
            return None
    base = settings.model.model_name_or_path
    data.base_model = None if Path(base).exists() else base  # a hub name; a path of this machine is nobody else's concern
    data.tags = [*(tag for tag in data.tags or [] if not tag.startswith("base_model:") and tag != MARK), MARK]
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts(settings, rows, summary))
    title = Path(settings.training.output_dir).resolve().name
    text = f"# {title}\n\nTrained with hf_memtune from {name_of(base)}.\n\n## How it was trained\n\n| | |\n|---|---|\n{lines}\n"
    write_text(path, f"---\n{data.to_yaml()}\n---\n\n{text}")
    return path


def facts(settings, rows, summary) -> list[tuple[str, str]]:
    """Name and value of each line of the card."""
    held_out = len(rows.held_out) if rows.held_out is not None else 0
    found = [
        ("base model", name_of(settings.model.model_name_or_path)),
        ("trained", what_is_trained(settings)),
        ("memory settings", ", ".join(written_levers(settings.training)) or "none"),
        ("trainable parameters", f"{summary.trainable_parameters:,} of {summary.parameters:,}"),
        ("data", f"{name_of(data_of(settings.data))}: {len(rows.train)} rows to train on, {held_out} held out"),
        ("longest row", f"{settings.data.max_length} tokens at most"),
        ("optimizer steps", str(summary.steps)),
        ("mean training loss", f"{summary.training_loss:.4f}" + of_kept(summary)),
    ]
    before, after = summary.held_out_loss
    if after is not None:
        found.append(("held-out loss", f"{after:.4f}" + ("" if before is None else f" ({before:.4f} before)")))
    for name, (_, value) in summary.held_out_scores.items():
        found.append((f"held-out {name.replace('_', ' ')}", f"{value:.4f}"))
    if summary.peak_bytes is not None:
        what = "on the device, weights included" if summary.on_device else "tensors of one step, above weights and optimizer state"
        found.append(("peak memory", f"{format_bytes(summary.peak_bytes)} ({what})"))
    return found


def what_is_trained(settings) -> str:
    model = settings.model
    if model.lora_r:
        return f"{'QLoRA' if model.load_in_4bit else 'LoRA'} of rank {model.lora_r}"
    is_reversible = settings.training.is_reversible or model.reversible_adapters is not None
    return "adapters of reversible layers" if is_reversible else "all parameters"


def data_of(data) -> str:
    """The name of the data: a data set, or a task or file of `glue`."""
    return next(value for name in ("dataset_name", "task_name", "train_file") if (value := getattr(data, name, None)) is not None)


def name_of(source: str) -> str:
    """A hub name as it is; of a path its last part, since nobody else has the others."""
    return Path(source).resolve().name if Path(source).exists() else source
