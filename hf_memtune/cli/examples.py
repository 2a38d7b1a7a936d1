"""What `hf-memtune tokens` looks at: which rows, scored how; and the model and the rows themselves."""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_memtune.cli.arguments import CLASSES, DataSource, ModelSource, changed
from hf_memtune.cli.checks import why_unwritable
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import setting
from hf_memtune.settings.scorers import BUILT_IN, facts_of
from hf_memtune.settings.seeking import TokenSeekingConfig

ROWS = 64  # to compare scorers on, unless asked for otherwise
ON_EVERY_MAP = ("context_weight", "gradient_weight", "context_layer", "context_normalize", "gradient_norm")  # of the scores that it shows
OF_SCORES = (*ON_EVERY_MAP, "reference_model", "profit_threshold")
SEED = 42  # of what is random, so that a page is the same each time
NEW_HEAD = (
    "model_name_or_path: {!r} has no head for classes, so it gets a new one, as at the start of training. Its weights are random, and so is what comes "
    "through it: the gradient and the combined score."
)
WEIGHTS = ("weight_cap", "token_weight")  # what a kept token counts for
UNREAD = {  # by this command, each with the reason
    "seek_schedule": "tokens are scored with the model as it is now",
    "seek_cache_dir": "tokens are scored with the model as it is now",
    "skip_threshold": "nothing goes backward",
    "packing": "rows are shown one by one",
}


@dataclass
class Examples:
    """Which examples, and where the page goes."""

    _argument_group_name = "examples"

    text: str | None = setting(None, "Text file, shown as one example all of whose tokens carry a label; in place of a data set.")
    index: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Rows of the data set to show, counted from 0; negative counts from the end."},
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Two or more scorers to compare over a data set, in place of single rows: {', '.join(BUILT_IN)}, or a registered name."
        },
    )
    rows: int | None = setting(None, f"With compare: rows to compare on, the first of the data set. More take longer. Default: {ROWS}.")
    out: str | None = setting(
        None,
        "Page to write. Beside it goes a picture, ending in .png, or with compare the numbers, ending in .json. "
        "Default: tokens.html, or scorers.html with compare.",
    )

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return Path(self.out or ("scorers.html" if self.compare else "tokens.html"))

    def problems(self) -> list[str]:
        found = []
        if self.text is not None and not Path(self.text).is_file():
            found.append(f"text: {self.text!r} is not a file.")
        if self.page.suffix not in (".html", ".htm"):
            found.append(f"out: got {self.out!r}, expected a name that ends in .html.")
        elif (why := why_unwritable(self.page.parent)) is not None:
            found.append(f"out: got {self.out or self.page.name!r}, and {why}. Name another one (--out).")
        if self.rows is not None and self.rows < 1:
            found.append(f"rows: got {self.rows}, expected 1 row or more.")
        return found


class Settings(NamedTuple):
    model: ModelSource
    data: DataSource
    examples: Examples
    seeking: TokenSeekingConfig

    @property
    def listed(self) -> dict[str, str]:
        """What a page says of where its rows are from, on top. A row may end at max_length, and not where its text does."""
        model, data = (Path(name).name for name in (self.model.model_name_or_path, self.examples.text or self.data.dataset_name))
        return {"model": model, "data": data, "max_length": f"{self.data.max_length} tokens"}


# -- what can be known to be wrong before anything is loaded


def problems_of_request(data: DataSource, namespace, given: set[str]) -> list[str]:
    """What does not go together, and what would do nothing. given: names of the settings that were given."""
    found = [f"{name}: has no effect here, since {reason}. Leave it out." for name, reason in UNREAD.items() if name in given]
    if not namespace.token_seeking:
        found.append("token_seeking: got False, but this command shows what token seeking keeps. Leave it out.")
    if "compare" not in given and "rows" in given:
        found.append("rows: has no effect without compare. Choose rows to show with --index, or scorers to compare with --compare.")
    return found + _problems_of_source(data, namespace, given)


def _problems_of_source(data: DataSource, namespace, given: set[str]) -> list[str]:
    """A text or a data set, not both; and nothing of a data set beside a text."""
    if namespace.text is None:
        missing = "dataset_name: got nothing, expected a data set (--dataset D), or a text file in its place (--text FILE)."
        return [missing if message.startswith("dataset_name: got nothing") else message for message in data.problems()]
    if "compare" in given:
        return ["text: got a text, but scorers are compared over a data set. Choose --text or --compare."]
    idle = [
        *changed(data, (name for name in asdict(data) if name not in ("max_length", "packing"))),
        *(["index"] if "index" in given else []),
    ]
    return [f"{name}: belongs to a data set, and --text was given. Choose one." for name in idle]


def problems_of_comparison(scorers: list[str], seeking: TokenSeekingConfig | None, given: set[str]) -> list[str]:
    """Of `--compare`. seeking: None where its own problems are told already."""
    from hf_memtune.training.scorer_comparison import configs_of, problems_of_scorers

    found = problems_of_scorers(scorers)
    if "index" in given:
        found.append("index: chooses single rows, and compare counts over the first ones. Choose how many with --rows.")
    if "token_scorer" in given:
        found.append("token_scorer: has no effect with compare, which names the scorers. Leave it out.")
    found += [
        f"{name}: has no effect with compare, which counts what is kept, not what it weighs. Leave it out."
        for name in WEIGHTS
        if name in given
    ]
    if seeking is not None and seeking.token_selection == "labelled":
        found.append("token_selection: got 'labelled', with which every scorer keeps the same tokens. Expected sample or top with compare.")
    if seeking is None or found:
        return found
    try:
        configs = configs_of(seeking, scorers)
    except ConfigError as error:
        return error.problems
    if all(config.keeps_all for config in configs):
        return ["token_ratio: got 1, with which every scorer keeps every token. Expected less than 1 with compare."]
    idle = [name for name in OF_SCORES if name in given and not any(name in config.scorer_settings() for config in configs)]
    return [f"{name}: none of the compared scorers ({', '.join(scorers)}) reads it. Leave it out, or compare another." for name in idle]


def without_effect(settings: Settings) -> dict[str, str]:
    """Settings that are read by nothing, each with the reason."""
    read = _read_here(settings.seeking.idle(), bool(settings.examples.compare))
    found = {name: reason for name, reason in settings.seeking.ineffective().items() if name not in read}
    return found | (settings.data.ineffective() if settings.examples.text is None else {})


def _read_here(idle: dict[str, str], compares: bool) -> set[str]:
    """Names of settings that something here reads, whether or not training does. idle: those that it does not, each with the setting that is the cause.

    What is of a score is on every map, and so is the score of the scorer where all tokens are kept. A comparison names the scorers; a setting that none
    of them reads is a problem of its own.
    """
    if compares:
        return {*OF_SCORES, *(name for name, cause in idle.items() if cause == "token_scorer")}
    return {*ON_EVERY_MAP, *(name for name in ("token_scorer", "reference_model") if idle.get(name) == "token_ratio")}


# -- the model and the rows


class Loaded(NamedTuple):
    """rows: tokenised; titles: of each; dropped: how many rows teach nothing, by reason; collate: makes a batch of rows."""

    model: Any
    tokenizer: Any
    rows: list
    titles: list[str]
    dropped: dict[str, int]
    collate: Any

    def batches(self) -> Iterator[dict]:
        """Rows one by one, so that padding plays no part, where the model is. Shows how far it is."""
        from rich.console import Console
        from rich.progress import track

        for row in track(self.rows, description="Scoring tokens", console=Console(stderr=True), disable=len(self.rows) < 3):
            yield {name: value.to(self.model.device) for name, value in self.collate([row]).items()}


def load(settings: Settings) -> Loaded:
    """The rows, then the model. Raises ConfigError for what only shows with the data."""
    import torch

    from hf_memtune.cli.data import collator
    from hf_memtune.cli.model import load_on_device, load_tokenizer

    torch.manual_seed(SEED)  # of a new head for classes, whose weights are random
    tokenizer = load_tokenizer(settings.model)
    source = _text_row if settings.examples.text else _rows_of_data
    rows, titles, classes, data, dropped = source(settings, tokenizer)
    model = load_on_device(settings.model, data, tokenizer, classes)
    return Loaded(model, tokenizer, rows, titles, dropped, collator(replace(data, packing=False), tokenizer))


def _text_row(settings: Settings, tokenizer):
    from hf_memtune.cli.data import text_row

    path = Path(settings.examples.text)
    data = DataSource(task="causal_lm", text_column="text", max_length=settings.data.max_length)
    row = text_row({"text": _read(path)}, data, tokenizer)
    if len(row["input_ids"]) < 2:
        raise ConfigError([f"text: {path} has no two tokens, so nothing in it can be predicted."])
    return [row], [path.name], None, data, {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"text: {str(path)!r} is no text in UTF-8 (byte {error.start})"
        raise ConfigError([f"{wrong}. Name a text file, saved as UTF-8; rows of a data set go to --dataset."]) from error


def _rows_of_data(settings: Settings, tokenizer):
    from hf_memtune.cli.data import load_rows, tokenised, understood
    from hf_memtune.cli.data.showing import tell_of

    examples = settings.examples
    found = understood(settings.data, tokenizer, settings.model, load_rows(settings.data, settings.data.dataset_split))
    (rows,), data, classes, _, not_read = found
    _require_token_losses(data, examples)
    if found.makes_head(settings.model):
        warnings.warn(NEW_HEAD.format(settings.model.model_name_or_path), stacklevel=2)
    tell_of({}, not_read)  # rows that are dropped are on the page, or refused
    index = _chosen(examples, len(rows), data)
    chosen, dropped = tokenised(rows.select(index), data, tokenizer, classes)
    if dropped and not examples.compare:
        told = ", ".join(f"{count} ({reason})" for reason, count in dropped.items())
        raise ConfigError([f"index: of the chosen rows some teach nothing: {told}. Choose others, or raise max_length."])
    return list(chosen), [f"row {number}" for number in index], classes, data, dropped


def _chosen(examples: Examples, count: int, data: DataSource) -> list[int]:
    """Numbers of the rows to look at, from 0."""
    if examples.compare:
        return list(range(min(count, examples.rows or ROWS)))
    outside = [number for number in examples.index if not -count <= number < count]
    if outside:
        raise ConfigError([f"index: got {outside}, but {data.dataset_name!r} has {count} rows."])
    return [number % count for number in examples.index]


def _require_token_losses(data: DataSource, examples: Examples) -> None:
    """Of what is compared. A gradient of the loss for a row comes to the one position that is read, and ranks no token."""
    wrong = [name for name in examples.compare if facts_of(name).reads_token_loss or facts_of(name).known_in_backward]
    if data.task == CLASSES and wrong:
        raise ConfigError(
            [
                f"compare: got {', '.join(wrong)}, but rows of task={CLASSES} have one loss each, not one for each token. "
                "Compare context, gradient or combined."
            ]
        )
