"""`hf-memtune tokens --model M (--text FILE | --dataset D)`: which tokens are scored how, and which would be kept.

    hf-memtune tokens --model M --dataset rows.jsonl --index 0 7 --token_ratio 0.2 --out tokens.html
    hf-memtune tokens --model M --dataset rows.jsonl --compare combined context gradient loss random --rows 200

The first writes a page, and a picture of the same name beside it, and prints how many of the kept tokens carry a label. The second compares
scorers over a data set, in a page with its numbers beside it as JSON.
"""

from pathlib import Path

from hf_memtune.cli.arguments import DataSource, ModelSource
from hf_memtune.cli.essentials import PAGES
from hf_memtune.cli.examples import SEED, Examples, Settings, load, problems_of_comparison, problems_of_request, without_effect
from hf_memtune.cli.lengths import bound_by_positions, config_of
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import no_effect
from hf_memtune.settings.seeking import TokenSeekingConfig


def run(arguments: list[str]) -> None:
    """Write the page and what goes beside it. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
    if settings.examples.compare:
        from hf_memtune.cli.scorers import compare

        return compare(settings)
    maps = make_maps(settings)
    page, picture = write(maps, settings)
    print_counts(maps, page, picture)


def make_parser():
    """The parser of this command. Every setting of token seeking is a flag, as in training."""
    from hf_memtune.cli.settings import Parser

    class Seeking(TokenSeekingConfig):
        _argument_group_name = "token seeking"

    page = PAGES["tokens"]
    kinds = [Examples, ModelSource, DataSource, Seeking]
    parser = Parser(kinds, usage=f"hf-memtune tokens {page.usage}", description=page.about)
    parser.set_defaults(token_seeking=True)
    return parser


def parse(arguments: list[str]) -> Settings:
    """Settings from flags. Raises ConfigError with every problem."""
    from hf_memtune.cli.settings import build, values_of
    from hf_memtune.core.scorers import problems_of_name

    parser = make_parser()
    namespace = parser.read(arguments, with_recipe=False)
    problems = parser.problems
    kinds = (ModelSource, Examples, TokenSeekingConfig)
    model, examples, seeking = (build(kind, values_of(kind, namespace), problems) for kind in kinds)
    data = DataSource(**values_of(DataSource, namespace))
    problems += problems_of_request(data, namespace, parser.given)
    if "compare" in parser.given:
        problems += problems_of_comparison(namespace.compare, seeking, parser.given)
    elif namespace.token_scorer is not None:
        problems += problems_of_name(namespace.token_scorer)
    settings = Settings(model, data, examples, seeking)
    if None not in (examples, seeking):
        told = {problem.partition(":")[0] for problem in problems}
        idle = without_effect(settings).items()
        problems += [f"{no_effect(name, reason)}. Leave it out." for name, reason in idle if name not in told]
    if problems:
        raise ConfigError(problems)
    bound_by_positions(data, parser.given, lambda: config_of(namespace.model_name_or_path))
    return settings


def make_maps(settings: Settings) -> list:
    """Token maps of the chosen examples."""
    import torch

    from hf_memtune.training.token_maps import token_maps

    loaded, maps = load(settings), []
    for batch, title in zip(loaded.batches(), loaded.titles, strict=True):
        torch.manual_seed(SEED)  # so that what is drawn of a row is the same whichever rows are shown beside it
        maps += token_maps(loaded.model, batch, settings.seeking, loaded.tokenizer, titles=[title])
    return maps


def write(maps: list, settings: Settings) -> tuple[Path, Path | str]:
    """The page and the picture, and where they are; where there is no picture, why."""
    from importlib.util import find_spec

    from hf_memtune.visualization import write_token_map_html, write_token_map_png

    page, listed = settings.examples.page, settings.listed
    page.parent.mkdir(parents=True, exist_ok=True)
    write_token_map_html(maps, page, listed)
    if not find_spec("matplotlib"):
        return page, "none: it needs matplotlib; pip install -e '.[viz]'"
    try:
        return page, write_token_map_png(maps, page.with_suffix(".png"), listed)
    except ValueError:
        return page, f"none: that of {len(maps)} rows would be taller than any viewer opens. Choose fewer with --index."


def print_counts(maps: list, page: Path, picture: Path | str) -> None:
    """How many tokens are kept, and how many of those carry a label."""
    from rich.console import Console
    from rich.table import Table

    from hf_memtune.visualization.token_map import count, percent

    table = Table("example", "tokens", "with a label", "kept", "kept with a label", "share of the kept with a label")
    for title, some in [*((one.title, [one]) for one in maps), *([("all", maps)] if len(maps) > 1 else [])]:
        n = count(some)
        table.add_row(title, str(n.tokens), str(n.labelled), str(n.kept), str(n.kept_labelled), percent(n.kept_labelled, n.kept))
    Console().print(table, f"page: {page}", f"picture: {picture}", sep="\n", markup=False)
