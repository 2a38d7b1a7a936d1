"""What a request for token seeking asks of a trainer beyond its arguments."""

from typing import Any

from hf_memtune.core.scorers import TokenScorer
from hf_memtune.settings.seeking import TokenSeekingConfig


def problems_of_seeking(args: TokenSeekingConfig, scorer: TokenScorer | None, train_dataset: Any) -> list[str]:
    """Problems of a scorer given as a function, and of a schedule on these data, one message each."""
    if not args.token_seeking:
        return [] if scorer is None else ["token_scorer: got a function, but token_seeking is off. Set token_seeking=True."]
    found = []
    if scorer is not None and not callable(scorer):
        found.append(f"token_scorer: got {scorer!r}, expected a function. Names go to args.token_scorer.")
    if scorer is not None and "token_scorer" in args.given:
        found.append(f"token_scorer: got a function and args.token_scorer={args.token_scorer!r}. Leave one of them out.")
    if scorer is None:
        found += TokenSeekingConfig.of(args).schedule_problems()
    if args.seek_schedule != "step" and train_dataset is not None and not hasattr(train_dataset, "__len__"):
        found.append(f"seek_schedule: got {args.seek_schedule!r} with a data set without length, which may never end. Use 'step'.")
    return found
