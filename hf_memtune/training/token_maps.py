"""Token maps of a batch: what the scores say of each token, and which are kept."""

from typing import Any

import torch
from torch import nn

from hf_memtune.core.loss import IGNORED
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.scoring import combined_score
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.settings.methods import TokenSeekingConfig
from hf_memtune.visualization.token_map import TokenMap


def token_maps(
    model: nn.Module,
    batch: dict[str, Any],
    config: TokenSeekingConfig,
    tokenizer,
    scorer: TokenScorer | None = None,
    titles: list[str] | None = None,
) -> list[TokenMap]:
    """One map for each row of `batch` (tensors of shape (batch, tokens), with labels).

    Shows the context, gradient and combined scores whatever the scorer, which decides what is kept; but the context score alone of
    a model whose last block cannot run alone, such as a reversible one. Of an encoder-decoder model the decoder is shown. The model
    is left as it was.
    """
    seeking = TokenSeeking(model, TokenSeekingConfig.of(config, token_seeking=True, seek_schedule="step"), scorer, looks_only=True)
    asked = ("context_score",) if seeking.facts.tail_problem else ("context_score", "gradient_score")
    try:
        found = seeking.inspect(batch, scores=asked)
    finally:
        seeking.remove()
    seen, selection = found.scores["decoder"], found.selection["decoder"]
    scores = {name.removesuffix("_score"): seen[name] for name in asked}
    if "gradient" in scores:
        pair = (seen["context_score"], seen["gradient_score"])
        scores["combined"] = combined_score(*pair, config.context_weight, config.gradient_weight, seen["real"])
    if scorer is not None or config.token_scorer not in (*scores, "random"):
        scores[getattr(scorer, "__name__", config.token_scorer)] = found.values["decoder"]
    labelled = torch.zeros_like(seen["real"]) if found.target is None else found.target != IGNORED
    ids = found.ids["decoder"]
    return [_token_map(row, ids, seen["real"], scores, selection.kept_mask(), labelled, tokenizer, titles) for row in range(len(ids))]


def _token_map(row, ids, real, scores, kept, labelled, tokenizer, titles) -> TokenMap:
    chosen = real[row]
    return TokenMap(
        title=titles[row] if titles else f"example {row + 1}",
        tokens=pieces(tokenizer, ids[row][chosen].tolist()),
        scores={name: values[row][chosen].tolist() for name, values in scores.items()},
        kept=kept[row][chosen].tolist(),
        labelled=labelled[row][chosen].tolist(),
    )


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text each token adds, so that joined they give the text (spaces included)."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        # decoded from a few tokens back: enough for the space and byte rules of every tokenizer, and linear in length
        start = max(0, end - 8)
        window = tokenizer.decode(ids[start:end])
        before = tokenizer.decode(ids[start : end - 1]) if end - 1 > start else ""
        found.append(window[len(before) :] if window.startswith(before) else tokenizer.decode(ids[end - 1 : end]))
    return found
