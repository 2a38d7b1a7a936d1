"""`hf-memtune tokens --compare SCORER SCORER ...`: what several scorers keep of a data set, side by side."""

from pathlib import Path

from hf_memtune.cli.examples import Settings, load


def compare(settings: Settings) -> None:
    """Count, write the page and its numbers, and print a few of them."""
    from hf_memtune.training.scorer_comparison import compare_scorers
    from hf_memtune.visualization.scorer_page import write_scorer_comparison

    loaded, scorers = load(settings), settings.examples.compare
    shares, decisions = compare_scorers(loaded.model, loaded.batches(), settings.seeking, scorers, loaded.tokenizer)
    listed = settings.listed
    if loaded.dropped:
        listed["rows left out"] = ", ".join(f"{count} ({reason})" for reason, count in loaded.dropped.items())
    page, numbers = write_scorer_comparison(shares, decisions, settings.examples.page, listed)
    _print(shares, page, numbers)


def _print(shares, page: Path, numbers: Path) -> None:
    """Of each scorer, how much of what it keeps lies where."""
    from rich.console import Console
    from rich.table import Table

    from hf_memtune.visualization.scorer_shares import PLACES, ROLES
    from hf_memtune.visualization.token_map import percent

    table = Table("scorer", "tokens kept", "of these with a label", "in the first tenth", "in the last tenth")
    for who in shares.columns:
        places = shares.shares(who, "position")
        labelled = shares.shares(who, "role")[ROLES[0]]
        table.add_row(
            who,
            f"{shares.kept(who):.1f}".removesuffix(".0"),
            *(percent(part, 1) for part in (labelled, places[PLACES[0]], places[PLACES[-1]])),
        )
    Console().print(table, f"rows: {shares.rows}", f"page: {page}", f"numbers: {numbers}", sep="\n", markup=False)
