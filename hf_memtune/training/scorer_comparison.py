"""What several scorers would keep of the same rows, from one pass over each."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hf_memtune.core.scorers import scorer_names
from hf_memtune.errors import ConfigError
from hf_memtune.methods.seeking.inspection import Chosen, Inspection
from hf_memtune.methods.seeking.method import TokenSeeking, resolve_scorer
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.token_maps import decision_of, labelled_tokens, only_looking, pieces
from hf_memtune.visualization.decision import Decision
from hf_memtune.visualization.scorer_shares import ComparedRow, ScorerShares
from hf_memtune.visualization.token_class import token_classes

SEED = 42  # of random picks, so that a page is the same each time


def problems_of_scorers(scorers: Sequence[str]) -> list[str]:
    """Why these scorers cannot be compared; empty where they can."""
    known, found = scorer_names(), []
    unknown = [name for name in dict.fromkeys(scorers) if name not in known]
    if len(set(scorers)) < 2 and not unknown:
        found.append(f"compare: got {' '.join(scorers) or 'nothing'}, expected two or more different scorers of {', '.join(known)}.")
    if repeated := sorted({name for name in scorers if scorers.count(name) > 1}):
        found.append(f"compare: got {', '.join(repeated)} more than once. Name each scorer once.")
    if unknown:
        found.append(f"compare: got {' '.join(unknown)}, expected two or more scorers, with spaces between them, of {', '.join(known)}.")
    return found


def configs_of(config: TokenSeekingConfig, scorers: Sequence[str]) -> list[TokenSeekingConfig]:
    """The settings with each of the scorers. Raises ConfigError with every problem that they have with one of them.

    What is always kept is the same for all of them: none, unless the settings say so, where by default that depends on the scorer.
    """
    found, problems, always = [], [], config.always_keep or "none"
    for name in scorers:
        try:
            found.append(TokenSeekingConfig.of(only_looking(config), token_scorer=name, always_keep=always))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def compare_scorers(
    model: nn.Module, batches: Iterable[dict[str, Any]], config: TokenSeekingConfig, scorers: Sequence[str], tokenizer
) -> tuple[ScorerShares, list[Decision]]:
    """What each scorer keeps of the rows of `batches` (tensors of shape (rows, tokens), with labels), and how, one a scorer.

    config: its token_scorer is not read. true_gradient is looked at with the cross entropy of the labels, for no loss is taken. Of an
    encoder-decoder model the decoder is counted. The model, and what is drawn at random after, are left as they were. Raises ConfigError for
    scorers that cannot be compared, and for those that this model has no score for.
    """
    if found := problems_of_scorers(scorers):
        raise ConfigError(found)
    configs = configs_of(config, scorers)
    seeking = TokenSeeking(model, configs[0], looks_only=True, check=True)
    try:
        _require_scores(seeking, configs)
        shares = ScorerShares(scorers)
        with preserved_rng(next(model.parameters()).device):
            torch.manual_seed(SEED)
            for batch in batches:
                for row in _rows(seeking.inspect(batch, others=configs[1:]), scorers, tokenizer):
                    shares.add(row)
        choosers, loss_per_token = [seeking.chooser_of(each) for each in configs], seeking.architecture.task.loss_per_token
        return shares, [decision_of(each.config, each.scorer, loss_per_token) for each in choosers]
    finally:
        seeking.remove()


def _require_scores(seeking: TokenSeeking, configs: Sequence[TokenSeekingConfig]) -> None:
    """Every scorer that needs the last block, where it cannot run alone, at once."""
    wrong = (
        [each.token_scorer for each in configs if resolve_scorer(each, None).facts.runs_last_block] if seeking.facts.tail_problem else []
    )
    if wrong:
        raise ConfigError([f"compare: got {', '.join(wrong)}, but {seeking.facts.tail_problem} Compare context and random."])


def _rows(found: Inspection, scorers: Sequence[str], tokenizer) -> list[ComparedRow]:
    by_scorer = [Chosen(found.values, found.selection, found.probability), *found.others]
    chances = {name: _chances(each) for name, each in zip(scorers, by_scorer, strict=True)}
    ids, real, labelled, special = found.ids["decoder"], found.scores["decoder"]["real"], labelled_tokens(found), special_ids(tokenizer)
    rows = []
    for row, here in enumerate(real):
        numbers = ids[row][here].tolist()
        classes = token_classes(pieces(tokenizer, numbers), numbers, special)
        kept = {name: values[row][here].tolist() for name, values in chances.items()}
        rows.append(ComparedRow(labelled[row][here].tolist(), classes, kept))
    return rows


def _chances(chosen: Chosen) -> torch.Tensor:
    """(B, T) float64: with which each token is kept; of the highest scores 1 or 0."""
    drawn = chosen.probability["decoder"]
    return chosen.selection["decoder"].kept_mask().double() if drawn is None else drawn


def special_ids(tokenizer) -> set[int]:
    """Ids of tokens that are no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}
