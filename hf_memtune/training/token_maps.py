"""Token maps of a batch: what the scores say of each token, and which are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_memtune.core.loss import IGNORED
from hf_memtune.core.scorers import Scorer, TokenScorer
from hf_memtune.core.scoring import combined_score
from hf_memtune.methods.seeking.choice import floor_of
from hf_memtune.methods.seeking.inspection import Inspection
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.settings.scorers import BUILT_IN
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.visualization.decision import Decision
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
    a model whose last block cannot run alone, such as a reversible one. Where tokens are drawn, it shows the probability of each to be
    kept; and it says how they are chosen. Of an encoder-decoder model the decoder is shown. The model is left as it was.
    """
    seeking = TokenSeeking(model, only_looking(config), scorer, looks_only=True)
    asked = ("context_score",) if seeking.facts.tail_problem else ("context_score", "gradient_score")
    weighed = ("token_loss",) if config.token_weight == "dft" else ()
    try:
        found = seeking.inspect(batch, scores=(*asked, *weighed))
    finally:
        seeking.remove()
    seen = found.scores["decoder"]
    scores = {name.removesuffix("_score"): seen[name] for name in asked}
    if "gradient" in scores:
        pair = (seen["context_score"], seen["gradient_score"])
        scores["combined"] = combined_score(*pair, config.context_weight, config.gradient_weight, seen["real"])
    if scorer is not None or seeking.scorer.name not in (*scores, "random"):
        scores[seeking.scorer.name] = found.values["decoder"]
    chances = {"probability": found.probability["decoder"], "label_probability": (-seen["token_loss"]).exp() if weighed else None}
    kept = found.selection["decoder"].kept_mask()
    columns = Columns(found.ids["decoder"], seen["real"], labelled_tokens(found), kept, scores, chances)
    decision = decision_of(seeking.config, seeking.scorer, seeking.architecture.task.loss_per_token)
    return [_token_map(row, columns, decision, tokenizer, titles) for row in range(len(columns.ids))]


def only_looking(config: TokenSeekingConfig) -> TokenSeekingConfig:
    """The settings with which a batch is looked at: as it would be trained on now. Where all tokens are kept, all run, whatever their label."""
    everything = {"select_from": "all"} if config.keeps_all else {}
    return TokenSeekingConfig.of(config, token_seeking=True, seek_schedule="step", **everything)


def labelled_tokens(found: Inspection) -> Tensor:
    """(B, T) bool: real or not, the tokens whose own prediction carries a label."""
    return torch.zeros_like(found.scores["decoder"]["real"]) if found.target is None else found.target != IGNORED


def decision_of(config: TokenSeekingConfig, scorer: Scorer, loss_per_token: bool) -> Decision:
    """What a page says of how tokens are chosen. config: as settled for the model. Without a loss for each token none has a label of its own, and
    all may be chosen."""
    own = scorer.name not in BUILT_IN  # reads whatever it likes
    return Decision(
        scorer=scorer.name,
        selection=config.token_selection,
        ratio=config.token_ratio,
        select_from=config.select_from if loss_per_token else "all",
        always_keep=config.kept_always,
        floor=floor_of(config, scorer),
        cap=config.weight_cap,
        weight=config.token_weight,
        parameters=config.scorer_settings(everything=own),
    )


class Columns(NamedTuple):
    """What is known of the tokens of a batch, (B, T) each. chances: by their names in a TokenMap; None where there are none."""

    ids: Tensor
    real: Tensor
    labelled: Tensor
    kept: Tensor
    scores: dict[str, Tensor]
    chances: dict[str, Tensor | None]


def _token_map(row: int, columns: Columns, decision: Decision, tokenizer, titles) -> TokenMap:
    real = columns.real[row]
    return TokenMap(
        title=titles[row] if titles else f"example {row + 1}",
        tokens=pieces(tokenizer, columns.ids[row][real].tolist()),
        scores={name: values[row][real].tolist() for name, values in columns.scores.items()},
        kept=columns.kept[row][real].tolist(),
        labelled=columns.labelled[row][real].tolist(),
        decision=decision,
        **{name: None if values is None else values[row][real].tolist() for name, values in columns.chances.items()},
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
