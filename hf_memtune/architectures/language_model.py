"""Whether a model that was loaded predicts the next token, as it was trained to: with weights that were stored, from the tokens before it."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.architectures.describe import takes_shifted_labels
from hf_memtune.architectures.trials import changes_of, has_values, trying


def problem_of_language_model(model: nn.Module, loading: dict[str, Any]) -> str | None:
    """What is wrong with a causal language model that was loaded; None: nothing.

    loading: `output_loading_info` of from_pretrained. Of adapters that were loaded, "missing_keys" are theirs.
    """
    missing = [] if getattr(model, "_hf_peft_config_loaded", False) else sorted(loading["missing_keys"])
    if missing:
        return f"does not store all weights of a language model: {', '.join(missing[:2])} ({len(missing)} in all) would be random"
    if takes_shifted_labels(model):
        return f"is loaded as {type(model).__name__}, whose loss takes labels that are shifted already: with those of a language model it would learn to copy"
    if looks_ahead(model):
        return (
            "predicts each token from the tokens on both sides, itself included, as models that fill in masked tokens do: its loss would teach it to "
            "copy"
        )
    return None


def looks_ahead(model: nn.Module) -> bool:
    """Whether the logits of a token depend on later ones: seen by changing the last of three. model: in evaluation mode, as it is loaded.

    False for what cannot be run here, such as kernels of another device, or weights without values.
    """
    if not has_values(model):
        return False
    try:
        with trying(model):
            before, after = (_earlier_logits(model, last) for last in (2, 3))
    except Exception:  # of many kinds, one for each way of not running; training says why
        return False
    return bool((changes_of(after, before) > _rounding(model)).all())  # one alone may be another expert, which rounding chose


def _rounding(model: nn.Module) -> float:
    """Of the norm of a position's logits: what may differ where nothing but the shape of a product does."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return 1e-3 if dtype in (torch.float32, torch.float64) else 1e-2


def _earlier_logits(model: nn.Module, last: int) -> Tensor:
    """(1, 2, V) float32: of the tokens before the last of a row. last: number of its token, from the middle of the vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    middle = model.config.get_text_config().vocab_size // 2  # type: ignore[union-attr, operator]
    ids = torch.tensor([[0, 1, last]], device=embedding.weight.device) + middle
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float()
