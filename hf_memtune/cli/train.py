"""`hf-memtune train [RECIPE.yaml] [--name value ...]`: fine-tune a model, and say what it cost and what it gained.

hf-memtune train configs/lm/seek.yaml --model_name_or_path M --dataset_name D --token_ratio 0.2
accelerate launch scripts/train.py --model_name_or_path M --dataset_name D --token_seeking --lora_r 8
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from hf_memtune.cli.arguments import DataArguments, ModelArguments
from hf_memtune.cli.budget import BudgetArguments, within_budget
from hf_memtune.cli.checks import (
    idle_epochs,
    problems_of_adapters,
    problems_of_folder,
    problems_of_optimizer,
    problems_of_output,
    problems_of_reports,
    problems_of_resuming,
    problems_of_scores,
    problems_of_trained,
    warnings_of_other_runs,
)
from hf_memtune.cli.lengths import bound_by_positions, config_of
from hf_memtune.cli.parser import WITHOUT_MEANING, make_parser, rows_of_evaluation
from hf_memtune.errors import ConfigError


class Settings(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: object  # MemEfficientTrainingArguments


def run(arguments: list[str]) -> None:
    """Train as the arguments say. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
    if budget_of(arguments).room is not None:
        settings = parse(within_budget(arguments), of_user=False)
    trainer, rows = make_trainer(settings)
    report(trainer, settings, rows, fit(trainer, settings))


def report(trainer, settings: Settings, rows, summary) -> None:
    """Write the summary and the model card, and print the summary. One process does."""
    if not trainer.is_world_process_zero():
        return
    from hf_memtune.cli.card import write_card
    from hf_memtune.cli.summary import print_summary, write_summary

    write_summary(summary, settings.training.output_dir)
    write_card(settings, rows, summary)
    print_summary(summary, settings, rows)


def parse(arguments: list[str], of_user: bool = True) -> Settings:
    """Settings from a recipe and flags. Raises ConfigError with every problem; see `read`."""
    parser = make_parser("train", more=(BudgetArguments,))
    built = read(arguments, parser, DataArguments, BudgetArguments, of_user=of_user)
    built.training.per_device_eval_batch_size = rows_of_evaluation(built.training, parser.given)
    if built.training.eval_strategy != "no" and not built.data.holds_out:
        strategy = str(built.training.eval_strategy.value)
        raise ConfigError([f"eval_strategy: got {strategy!r}, but no rows are held out. Set eval_fraction or eval_split."])
    return built


def budget_of(arguments: list[str]) -> BudgetArguments:
    """The memory budget among arguments that `parse` has read."""
    from hf_memtune.cli.settings import values_of

    return BudgetArguments(**values_of(BudgetArguments, make_parser("train", more=(BudgetArguments,)).read(arguments, with_recipe=True)))


def read(arguments: list[str], parser, data: type, *more: type, of_user: bool = True) -> Settings:
    """What `parser` makes of a recipe and flags; data: the class of its settings of data. Raises ConfigError with every problem.

    more: classes of further settings, whose problems and warnings are told as well. A flag without effect is a problem: it was meant to
    do something. A line of a recipe without effect is warned of: recipes are shared. of_user: whether all flags come from the user.
    """
    from hf_memtune.cli.settings import build, idle_flags, values_of
    from hf_memtune.training.arguments import MemEfficientTrainingArguments

    namespace = parser.read(arguments, with_recipe=True)
    problems = parser.problems
    meaningless = parser.given & WITHOUT_MEANING.keys()
    problems += [f"{name}: has no meaning here ({WITHOUT_MEANING[name]}). Leave it out." for name in sorted(meaningless)]
    kinds = (ModelArguments, data, MemEfficientTrainingArguments)
    built = Settings(*(build(kind, values_of(kind, namespace), problems) for kind in kinds))
    further = [build(kind, values_of(kind, namespace), problems) for kind in more]
    if built.model is not None:
        name = built.model.model_name_or_path
        problems += problems_of_trained(name) or problems_of_folder(name, built.model.reversible_adapters)
    if built.training is not None:
        problems += [
            *problems_of_reports(built.training),
            *problems_of_resuming(built.training),
            *problems_of_optimizer(built.training),
            *problems_of_scores(built.data, built.training),
        ]
    if built.model is not None and built.training is not None:
        problems += problems_of_output(built.model, built.training)
        problems += problems_of_adapters(built.model, built.training)
    idle, ineffective = idle_flags((*built, *further), parser, idle_epochs(built.training, parser.given))
    problems += idle if of_user else []
    if problems:
        raise ConfigError(problems)
    if built.model.reversible_adapters is not None and built.training.is_reversible:
        got = f"got {built.model.reversible_adapters!r} with reversible={built.training.reversible}"
        raise ConfigError([f"reversible_adapters: {got}. Leave out reversible: the folder says how they were trained."])
    for message in (*ineffective, *warnings_of_other_runs(built.training)):
        warnings.warn(message, stacklevel=2)
    bound_by_positions(built.data, parser.given, lambda: config_of(built.model.model_name_or_path))
    return built


def make_trainer(settings: Settings):
    """The trainer, with model and data loaded, and the rows, some of which are shown."""
    from hf_memtune.cli.data import prepare
    from hf_memtune.cli.data.rows import lengths_of
    from hf_memtune.cli.data.showing import show
    from hf_memtune.cli.traps import traps

    def prepared(data, tokenizer):
        rows = prepare(data, tokenizer, settings.model)
        if settings.training.process_index == 0:
            show(rows, tokenizer, data.show_rows)
            together = settings.training.per_device_train_batch_size if data.packing else 1
            for message in () if rows.classes else traps(settings.training, lengths_of(rows.train, together)):
                warnings.warn(message, stacklevel=2)
        return rows

    return trainer_on(settings, prepared, lambda rows: accuracy if rows.classes else None)


def trainer_on(settings: Settings, prepare: Callable, metrics_of: Callable):
    """The trainer and the rows. prepare: rows from settings of data and a tokenizer; metrics_of: compute_metrics, or None, from rows."""
    from transformers import set_seed

    from hf_memtune.cli.data import check_packing, collator
    from hf_memtune.cli.model import load_tokenizer, load_trainable, slow_dtype, with_reversible_adapters
    from hf_memtune.cli.progress import make_readable
    from hf_memtune.forecast.estimate import estimate
    from hf_memtune.training.trainer import MemEfficientTrainer

    model, data, training = settings
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is nothing to pin for, and torch would say so
    set_seed(training.seed)  # LoRA's first weights, and those of a new head, are random
    tokenizer = load_tokenizer(model)
    with training.main_process_first(desc="preparing the data"):
        rows = prepare(data, tokenizer)
    data = getattr(rows, "data", data)  # with the task that the rows are for
    if getattr(data, "packing", False):
        training.remove_unused_columns = False  # the model takes no lengths of parts, the collator does: it keeps rows apart by them
    loaded = load_trainable(model, data, tokenizer, rows.classes)
    if slow := slow_dtype(loaded, training.device):
        warnings.warn(slow, stacklevel=2)
    trainer = MemEfficientTrainer(
        model=loaded,
        reversible=with_reversible_adapters(loaded, model),
        args=training,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=collator(data, tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics_of(rows),
    )
    check_packing(data, loaded, trainer.data_collator)
    trainer.measures_held_out = True  # `fit` does
    trainer.estimate = estimate  # the package hands it to who imports the class from its top
    make_readable(trainer)
    return trainer, rows


def held_out(trainer) -> dict[str, float]:
    """eval_loss, and eval_accuracy of a classifier, over the held-out rows: all tokens, plain forward. Empty without rows."""
    return {} if trainer.eval_dataset is None else trainer.evaluate()


def fit(trainer, settings: Settings, measure: Callable = held_out):
    """Measure, train and save, measure. Under FSDP2 transformers evaluates no model before its training."""
    from hf_memtune.cli.same_base import note_base
    from hf_memtune.cli.same_rows import note_rows
    from hf_memtune.cli.saving import BestAfterMove, SaveFirst, SaveLabels
    from hf_memtune.cli.summary import StepTimes, Summary

    times, resumed = StepTimes(), settings.training.resume_from_checkpoint
    for callback in (times, BestAfterMove(), SaveFirst(trainer), SaveLabels(trainer)):
        trainer.add_callback(callback)
    note_rows(trainer, resumed)
    note_base(trainer, resumed)
    before = {} if resumed or trainer.is_fsdp_enabled else measure(trainer)
    result = trainer.train(resume_from_checkpoint=resumed)
    logs = [*trainer.state.log_history, trainer.memory_callback.since_last_log()]
    after = measure(trainer)
    trainer.save_state()  # again, with what was measured
    return Summary.of(trainer, logs, times.seconds, result.training_loss, (before, after))


def accuracy(prediction) -> dict[str, float]:
    """Share of rows whose likeliest class is the right one."""
    from hf_memtune.evaluation import load_metric

    found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions  # some return states, too
    return load_metric("accuracy").compute(predictions=found.argmax(-1), references=prediction.label_ids)
