"""`hf-memtune qa [RECIPE.yaml] [--name value ...]`: fine-tune on one of five question-answering tasks, and score it by lm-eval.

hf-memtune qa configs/qa/sciq.yaml --model M
accelerate launch scripts/train_qa.py configs/qa/piqa.yaml --train_file train.jsonl --test_file dev.jsonl
"""

from pathlib import Path
from typing import Any

from hf_memtune.cli import parser, train
from hf_memtune.cli.qa_arguments import QaArguments
from hf_memtune.cli.qa_data import QaRows, prepare


def run(arguments: list[str]) -> None:
    """Score, train and score as the arguments say. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
    trainer, rows = make_trainer(settings)
    results: list[dict[str, Any]] = []  # what lm-eval returned, before and after
    summary = train.fit(trainer, settings, lambda trainer: held_out(trainer, rows, results))
    train.report(trainer, settings, rows, summary)
    if trainer.is_world_process_zero():
        write(results, settings, trainer.state.epoch)


def make_parser():
    """The parser of this command: that of `train`, with tasks in place of its data."""
    return parser.make_parser("qa", QaArguments)


def parse(arguments: list[str]) -> train.Settings:
    """Settings from a recipe and flags. Raises ConfigError with every problem; warns of settings without effect."""
    return train.read(arguments, make_parser(), QaArguments)


def make_trainer(settings: train.Settings):
    """The trainer, with model and data loaded, and the rows."""
    from hf_memtune.training.harness import require_whole_model

    trainer, rows = train.trainer_on(settings, prepare, lambda rows: None)
    require_whole_model("qa")
    return trainer, rows


def held_out(trainer, rows: QaRows, results: list[dict[str, Any]]) -> dict[str, float]:
    """eval_loss of the right answers, and what lm-eval measures of the task: eval_acc, eval_acc_stderr, ..."""
    from hf_memtune.evaluation.harness import logged, score, scores_of
    from hf_memtune.training.rng import preserved_rng

    found = trainer.evaluate()
    with preserved_rng(trainer.args.device):
        scored = score(trainer.model, rows.tokenizer, rows.tasks, trainer.args.per_device_eval_batch_size, rows.limit)
    if scored is None:
        return found
    results.append(scored)
    return found | logged(scores_of(scored), by_task=False)


def write(results: list[dict[str, Any]], settings: train.Settings, epochs: float) -> None:
    """scores.json, what lm-eval returned after training, and scores.png, with what was before. epochs: that were trained."""
    from hf_memtune.cli.task_scores import write_picture
    from hf_memtune.evaluation.harness import table_of, write_results

    print(table_of(results[-1]))
    written = write_results(results[-1], Path(settings.training.output_dir, "scores.json"))
    when = {"": results[0]} if len(results) == 1 else {" before training": results[0], " after": results[-1]}
    write_picture(when, written, f"{settings.data.task_name}, {epochs:.3g} epochs")
