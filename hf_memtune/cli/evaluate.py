"""`hf-memtune evaluate --model M --dataset D`: the loss on a data set, of a model or of reversible adapters that were trained on it.

hf-memtune evaluate --model M --dataset rows.jsonl --dataset_split "train[-200:]" --reversible_adapters out
hf-memtune evaluate --model M --tasks sciq,piqa

With tasks in place of a data set, lm-eval scores them: see task_scores.py.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hf_memtune.cli.arguments import DataSource, ModelSource
from hf_memtune.cli.essentials import PAGES
from hf_memtune.cli.lengths import bound_by_positions, config_of
from hf_memtune.cli.task_scores import TaskArguments
from hf_memtune.cli.task_scores import run as run_tasks
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import setting


@dataclass
class Measuring:
    """On how much, and at what pace."""

    _argument_group_name = "measuring"

    max_eval_rows: int | None = setting(None, "Measure on this many rows at most, the first ones. Default: all.")
    per_device_eval_batch_size: int = setting(
        8,
        "Rows at a time; the loss is the mean over batches, as with transformers: that of `train` is of its own per_device_eval_batch_size.",
    )

    def problems(self) -> list[str]:
        given = {"max_eval_rows": self.max_eval_rows, "per_device_eval_batch_size": self.per_device_eval_batch_size}
        return [f"{name}: got {value}, expected 1 or more." for name, value in given.items() if value is not None and value < 1]


class Settings(NamedTuple):
    """data: None where there are tasks."""

    model: ModelSource
    data: DataSource | None
    measuring: Measuring
    tasks: TaskArguments


def run(arguments: list[str]) -> None:
    """Print loss, and accuracy of classifiers; or scores of tasks. Raises ConfigError with all problems of the settings, before anything is loaded."""
    from rich.console import Console
    from rich.table import Table

    settings = parse(arguments)
    if settings.data is None:
        return run_tasks(settings.model, settings.tasks, settings.measuring.per_device_eval_batch_size)
    table = Table(show_header=False)
    for name, value in measured(settings).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def parse(arguments: list[str]) -> Settings:
    """Settings from flags. Raises ConfigError with every problem."""
    from hf_memtune.cli.settings import Parser, build, idle_flags, values_of

    kinds = (ModelSource, DataSource, Measuring, TaskArguments)
    page = PAGES["evaluate"]
    parser = Parser(list(kinds), usage=f"hf-memtune evaluate {page.usage}", description=page.about)
    namespace = parser.read(arguments, with_recipe=False)
    problems = parser.problems
    if namespace.tasks:
        idle = parser.given & {*DataSource.__dataclass_fields__, "max_eval_rows"}
        problems += [f"{name}: has no effect with tasks, which have rows of their own. Leave it out." for name in sorted(idle)]
    wanted = [kind for kind in kinds if kind is not DataSource or not namespace.tasks]
    built = {kind: build(kind, values_of(kind, namespace), problems) for kind in wanted}
    data = built.get(DataSource)
    problems += idle_flags([data], parser)[0]
    if problems:
        raise ConfigError(problems)
    bound_by_positions(data, parser.given, lambda: config_of(namespace.model_name_or_path))
    return Settings(built[ModelSource], data, built[Measuring], built[TaskArguments])


def measured(settings: Settings) -> dict[str, float | int]:
    """rows, loss, and accuracy of a classifier; all labelled tokens, plain forward through the layers as they were trained."""
    from transformers import Trainer, TrainingArguments

    from hf_memtune.cli.data import check_packing, collator, load_rows, tokenised, understood
    from hf_memtune.cli.data.showing import tell_of
    from hf_memtune.cli.model import load_model, load_tokenizer, with_reversible_adapters
    from hf_memtune.cli.train import accuracy
    from hf_memtune.training.loss_alone import logits_on_demand

    model, data, measuring, _ = settings
    tokenizer = load_tokenizer(model)
    found = understood(data, tokenizer, model, load_rows(data, data.dataset_split))
    (rows,), data, classes, _, not_read = found
    if found.makes_head(model):
        wrong = f"{model.model_name_or_path!r} has no head for classes, which rows with {data.label_column!r} are for"
        raise ConfigError([f"model_name_or_path: {wrong}. Name a trained classifier, or measure the text alone: --task causal_lm."])
    rows, dropped = tokenised(rows.select(range(min(len(rows), measuring.max_eval_rows or len(rows)))), data, tokenizer, classes)
    tell_of(dropped, not_read)
    loaded = load_model(model, data, tokenizer, classes)
    with_reversible_adapters(loaded, model)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_eval_batch_size=measuring.per_device_eval_batch_size, report_to=[])
        trainer = Trainer(loaded, args, collator(data, tokenizer), eval_dataset=rows, compute_metrics=accuracy if classes else None)
        check_packing(data, loaded, trainer.data_collator)
        whole = classes or args.n_gpu > 1  # of classes logits are looked at; several devices in one process run copies of the model
        with nullcontext() if whole else logits_on_demand(loaded):
            found = trainer.evaluate()
    return {"rows": len(rows), "loss": found["eval_loss"]} | ({"accuracy": found["eval_accuracy"]} if classes else {})
