"""The model that the settings describe, without its weights: from its config alone, a folder's, the hub's, or one spelt out in sizes."""

import json
from pathlib import Path

from hf_memtune.cli.arguments import DataSource, ModelArguments
from hf_memtune.cli.checks import ADAPTERS
from hf_memtune.errors import ConfigError


def blank_trainable(model: ModelArguments, data: DataSource, sizes: str | None = None):
    """What `load_trainable` would load, on the meta device: whole, or frozen (in 4 bits where asked for) with LoRA adapters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from hf_memtune.cli.model import four_bits, with_adapters
    from hf_memtune.forecast.blank_model import blank_model, in_four_bits

    config = read_config(model.model_name_or_path, sizes)
    if model.attn_implementation is not None:
        config._attn_implementation = model.attn_implementation
    classifies = data.task == "sequence_classification"
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    made = blank_model(config, dtype, AutoModelForSequenceClassification if classifies else AutoModelForCausalLM)
    if classifies and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0
    with torch.device("meta"):
        if model.load_in_4bit:
            made = in_four_bits(made, four_bits(model))
        return with_adapters(made, model, data) if model.lora_r else made


def read_config(name: str, sizes: str | None):
    """The config of a model: of a folder, of SHAPES, of a model type, or of a hub name; with `sizes` (name=value,...) in it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from hf_memtune.memory.shapes import SHAPES

    if Path(name, ADAPTERS).is_file() and not Path(name, "config.json").is_file():
        raise ConfigError([_of_adapters(Path(name))])
    try:
        if is_without_weights(name) and name in SHAPES:
            config = SHAPES[name]()
        elif is_without_weights(name):
            return CONFIG_MAPPING[name](**_parsed(sizes, CONFIG_MAPPING[name]()))  # what follows from sizes follows from these
        else:
            config = AutoConfig.from_pretrained(name)
        config.update(_parsed(sizes, config))
    except (OSError, ValueError, ImportError) as error:
        known = f"a folder with a config.json, a hub name, a model type with --config_overrides, or one of {', '.join(SHAPES)}"
        raise ConfigError([f"model_name_or_path: no config in {name!r} ({error}). Expected {known}."]) from error
    return config


def _of_adapters(folder: Path) -> str:
    saved = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    base, rank = saved.get("base_model_name_or_path") or "M", saved.get("r") or "N"
    wrong = f"the folder {str(folder)!r} holds LoRA adapters ({ADAPTERS}), expected a model"
    return f"model_name_or_path: {wrong}. Name the model that they were trained on, and their rank: --model {base} --lora_r {rank}."


def is_without_weights(name: str) -> bool:
    """Whether the name stands for sizes alone: nothing could be trained under it. A folder of that name goes first, as where models are loaded."""
    from transformers import CONFIG_MAPPING

    from hf_memtune.memory.shapes import SHAPES

    return (name in SHAPES or name in CONFIG_MAPPING) and not Path(name, "config.json").is_file()


def _parsed(sizes: str | None, config) -> dict:
    """Sizes as a dict. Raises ValueError for what `config` does not have."""
    import yaml

    found = dict(part.split("=", 1) if "=" in part else (part, "") for part in sizes.split(",")) if sizes else {}
    if unknown := [name for name in found if not hasattr(config, name)]:
        raise ValueError(f"a {type(config).__name__} has no {', '.join(unknown)}")
    return {name: yaml.safe_load(value) for name, value in found.items()}
