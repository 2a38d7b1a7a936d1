"""`hf-memtune tokens --model M (--text FILE | --dataset D)`: which tokens are scored how, and which would be kept.

    hf-memtune tokens --model M --dataset rows.jsonl --index 0 7 --token_ratio 0.2 --out tokens.html

Writes a page, and a picture of the same name beside it, and prints how many of the kept tokens carry a label.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from hf_memtune.cli.arguments import DataSource, ModelSource, changed
from hf_memtune.cli.essentials import PAGES
from hf_memtune.errors import ConfigError
from hf_memtune.settings.methods import TokenSeekingConfig


@dataclass
class Examples:
    """Which examples, and where the page goes."""

    _argument_group_name = "examples"

    text: str | None = field(
        default=None,
        metadata={"help": "Text file, shown as one example all of whose tokens carry a label; in place of a data set."},
    )
    index: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Rows of the data set to show, counted from 0; negative counts from the end."},
    )
    out: str = field(default="tokens.html", metadata={"help": "Page to write; the picture goes beside it, ending in .png."})

    def problems(self) -> list[str]:
        found = []
        if self.text is not None and not Path(self.text).is_file():
            found.append(f"text: {self.text!r} is not a file.")
        if Path(self.out).suffix not in (".html", ".htm"):
            found.append(f"out: got {self.out!r}, expected a name that ends in .html.")
        return found


# Settings that decide what a map looks like, listed on top of it.
SHOWN = (
    "token_ratio", "token_scorer", "context_weight", "gradient_weight", "context_layer", "context_normalize",
    "gradient_norm", "select_from", "token_selection", "always_keep",
)  # fmt: skip


class Settings(NamedTuple):
    model: ModelSource
    data: DataSource
    examples: Examples
    seeking: TokenSeekingConfig


def run(arguments: list[str]) -> None:
    """Write the page and the picture. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
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
    import warnings

    from hf_memtune.cli.settings import build, values_of

    parser = make_parser()
    namespace = parser.read(arguments, with_recipe=False)
    problems = parser.problems
    kinds = (ModelSource, Examples, TokenSeekingConfig)
    model, examples, seeking = (build(kind, values_of(kind, namespace), problems) for kind in kinds)
    data = DataSource(**values_of(DataSource, namespace))
    problems += _data_problems(data, namespace, parser.given)
    if not namespace.token_seeking:
        problems.append("token_seeking: got False, but this command shows what token seeking keeps. Leave it out.")
    if problems:
        raise ConfigError(problems)
    for message in [*seeking.ineffective(), *(data.ineffective() if examples.text is None else [])]:
        warnings.warn(message, stacklevel=2)
    return Settings(model, data, examples, seeking)


def _data_problems(data: DataSource, namespace, given: set[str]) -> list[str]:
    """A text or a data set, not both; and nothing of a data set beside a text."""
    if namespace.text is None:
        missing = "dataset_name: got nothing, expected a data set (--dataset D), or a text file in its place (--text FILE)."
        return [missing if message.startswith("dataset_name: got nothing") else message for message in data.problems()]
    idle = [*changed(data, (name for name in asdict(data) if name != "max_length")), *(["index"] if "index" in given else [])]
    return [f"{name}: belongs to a data set, and --text was given. Choose one." for name in idle]


def make_maps(settings: Settings) -> list:
    """Token maps of the chosen examples, made one by one, so that padding plays no part."""
    import torch

    from hf_memtune.cli.data import collator
    from hf_memtune.cli.model import load_model, load_tokenizer, with_reversible_adapters
    from hf_memtune.training.token_maps import token_maps

    tokenizer = load_tokenizer(settings.model)
    rows, titles, classes, data = _text_row(settings, tokenizer) if settings.examples.text else _chosen_rows(settings, tokenizer)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = load_model(settings.model, data, tokenizer, classes).to(device)
    with_reversible_adapters(model, settings.model)
    collate, maps = collator(replace(data, packing=False), tokenizer), []
    for row, title in zip(rows, titles, strict=True):
        batch = {name: value.to(device) for name, value in collate([row]).items()}
        maps += token_maps(model, batch, settings.seeking, tokenizer, titles=[title])
    return maps


def _text_row(settings: Settings, tokenizer):
    from hf_memtune.cli.data import text_row

    path = Path(settings.examples.text)
    data = DataSource(task="causal_lm", text_column="text", max_length=settings.data.max_length)
    row = text_row({"text": path.read_text(encoding="utf-8")}, data, tokenizer)
    if len(row["input_ids"]) < 2:
        raise ConfigError([f"text: {path} has no two tokens, so nothing in it can be predicted."])
    return [row], [path.name], None, data


def _chosen_rows(settings: Settings, tokenizer):
    from hf_memtune.cli.data import check_columns, class_names, load_rows, resolved, tokenised
    from hf_memtune.cli.data.rows import use_template

    data, index = settings.data, settings.examples.index
    rows = load_rows(data, data.dataset_split)
    data = resolved(data, rows.column_names)
    check_columns(data, rows.column_names)
    use_template(data, tokenizer)
    outside = [number for number in index if not -len(rows) <= number < len(rows)]
    if outside:
        raise ConfigError([f"index: got {outside}, but {data.dataset_name!r} has {len(rows)} rows."])
    classes = class_names(data, rows)
    chosen, dropped = tokenised(rows.select([number % len(rows) for number in index]), data, tokenizer, classes)
    if dropped:
        told = ", ".join(f"{count} ({reason})" for reason, count in dropped.items())
        raise ConfigError([f"index: of the chosen rows some teach nothing: {told}. Choose others, or raise max_length."])
    return list(chosen), [f"row {number % len(rows)}" for number in index], classes, data


def write(maps: list, settings: Settings) -> tuple[Path, Path | None]:
    """The page and the picture, and where they are; without matplotlib there is no picture."""
    from importlib.util import find_spec

    from hf_memtune.visualization import write_token_map_html, write_token_map_png

    page = Path(settings.examples.out)
    page.parent.mkdir(parents=True, exist_ok=True)
    listed = {"model": Path(settings.model.model_name_or_path).name}
    listed |= {name: getattr(settings.seeking, name) for name in SHOWN}
    write_token_map_html(maps, page, listed)
    return page, write_token_map_png(maps, page.with_suffix(".png"), listed) if find_spec("matplotlib") else None


def print_counts(maps: list, page: Path, picture: Path | None) -> None:
    """How many tokens are kept, and how many of those carry a label."""
    from rich.console import Console
    from rich.table import Table

    from hf_memtune.visualization.token_map import count, percent

    table = Table("example", "tokens", "with a label", "kept", "kept with a label", "share of the kept with a label")
    for title, some in [*((one.title, [one]) for one in maps), *([("all", maps)] if len(maps) > 1 else [])]:
        n = count(some)
        table.add_row(title, str(n.tokens), str(n.labelled), str(n.kept), str(n.kept_labelled), percent(n.kept_labelled, n.kept))
    drawn = picture or "none: it needs matplotlib; pip install 'hf_memtune[viz]'"
    Console().print(table, f"page: {page}", f"picture: {drawn}", sep="\n", markup=False)
