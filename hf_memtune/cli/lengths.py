"""How long rows may be: a model may have positions for so many tokens."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from hf_memtune.cli.checks import ADAPTERS
from hf_memtune.errors import ConfigError


def positions_of(config) -> int | None:
    """Tokens that a model has positions for; None: it knows no bound."""
    from hf_memtune.architectures.tables import POSITION_RULES

    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and POSITION_RULES.get(text.model_type) == "padding_idx":
        positions -= text.pad_token_id + 1  # which no token has, as in RoBERTa's 514 for rows of 512
    return positions if positions is not None and positions > 0 else None


def check_length(loaded, tokens: int, setting: str = "max_length") -> None:
    """Raises ConfigError for more tokens than the model has positions. setting: what they were given as."""
    positions = positions_of(loaded.config)
    if positions is not None and tokens > positions:
        wrong = f"got {tokens} tokens, but the model has positions for {positions}"
        raise ConfigError([f"{setting}: {wrong}. Set it to that or less."])


def bound_by_positions(data, given: Collection[str], read: Callable) -> None:
    """Where max_length was not given, make it no more than the model has positions for. read: makes its config; a model without one is refused later."""
    if data is None or "max_length" in given:
        return
    try:
        positions = positions_of(read())
    except (ConfigError, OSError, ValueError, ImportError):
        return
    data.max_length = min(data.max_length, positions or data.max_length)


def config_of(name: str):
    """Of a model, or of the one that LoRA adapters were trained on."""
    from transformers import AutoConfig

    if Path(name, ADAPTERS).is_file() and not Path(name, "config.json").is_file():
        name = json.loads(Path(name, ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path") or name
    return AutoConfig.from_pretrained(name)
