"""`hf-memtune glue [RECIPE.yaml] [--name value ...]`: fine-tune an encoder on a task of GLUE, or on sentences of one's own.

hf-memtune glue configs/glue/mrpc.yaml --reversible centred
accelerate launch scripts/train_glue.py configs/glue/mrpc.yaml --train_file train.csv --validation_file dev.csv
"""

from collections.abc import Callable
from functools import partial
from statistics import mean

from hf_memtune.cli import parser, train
from hf_memtune.cli.glue_arguments import GlueArguments
from hf_memtune.cli.glue_data import GlueRows, prepare
from hf_memtune.cli.glue_tasks import GlueTask


def run(arguments: list[str]) -> None:
    """Train and measure as the arguments say. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
    trainer, rows = make_trainer(settings)
    summary = train.fit(trainer, settings, lambda trainer: held_out(trainer, rows))
    train.report(trainer, settings, rows, summary)


def make_parser():
    """The parser of this command: that of `train`, with tasks and sentences in place of its data."""
    return parser.make_parser("glue", GlueArguments)


def parse(arguments: list[str]) -> train.Settings:
    """Settings from a recipe and flags. Raises ConfigError with every problem; warns of settings without effect."""
    return train.read(arguments, make_parser(), GlueArguments)


def make_trainer(settings: train.Settings):
    """The trainer, with model and data loaded, and the rows."""
    prepared = partial(prepare, model=settings.model)
    return train.trainer_on(settings, prepared, lambda rows: scores_of(settings.data.resolved, len(rows.classes)))


def held_out(trainer, rows: GlueRows) -> dict[str, float]:
    """eval_loss and the scores of the first held-out set, and those of the others with their names: eval_mismatched_accuracy."""
    _, *others = rows.held_outs
    found = trainer.evaluate()
    for name in others:
        found |= trainer.evaluate(rows.held_outs[name], metric_key_prefix=f"eval_{name}")
    return found


def scores_of(task: GlueTask, classes: int) -> Callable:
    """A `compute_metrics` of Trainer: every metric of the task and, of several, their mean as combined_score, as GLUE reports it."""
    from hf_memtune.evaluation import load_metric

    metrics = {name: load_metric(name) for name in task.metrics}
    options = {"f1": {"average": "macro"} if classes > 2 else {}}

    def scores(prediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = logits.squeeze(-1) if task.is_regression else logits.argmax(-1)
        found: dict[str, float] = {}
        for name, metric in metrics.items():
            found |= metric.compute(predictions=predicted, references=prediction.label_ids, **options.get(name, {}))
        return found | ({"combined_score": mean(found.values())} if len(found) > 1 else {})

    return scores
