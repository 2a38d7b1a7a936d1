"""`hf-memtune train [RECIPE.yaml] [--name value ...]`: fine-tune a model, and say what it cost and what it gained.

    hf-memtune train configs/lm/seek.yaml --model_name_or_path M --dataset_name D --token_ratio 0.2
    accelerate launch scripts/train.py --model_name_or_path M --dataset_name D --token_seeking --lora_r 8
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from hf_memtune.cli.arguments import DataArguments, ModelArguments
from hf_memtune.cli.budget import BudgetArguments, within_budget
from hf_memtune.cli.parser import make_parser
from hf_memtune.errors import ConfigError

# Fields of TrainingArguments that Trainer leaves to scripts, and that mean nothing in this one.
WITHOUT_MEANING = {
    "do_train": "this command always trains",
    "do_eval": "held-out rows are always evaluated, before and after training; eval_strategy adds evaluations in between",
    "do_predict": "this command predicts nothing",
}


class Settings(NamedTuple):
    model: ModelArguments
    data: DataArguments
    training: object  # MemEfficientTrainingArguments


def run(arguments: list[str]) -> None:
    """Train as the arguments say. Raises ConfigError with all problems of the settings, before anything is loaded."""
    settings = parse(arguments)
    if budget_of(arguments).room is not None:
        settings = parse(within_budget(arguments))
    trainer, rows = make_trainer(settings)
    summary = fit(trainer, settings)
    if trainer.is_world_process_zero():
        from hf_memtune.cli.summary import print_summary, write_summary

        write_summary(summary, settings.training.output_dir)
        print_summary(summary, settings, rows)


def parse(arguments: list[str]) -> Settings:
    """Settings from a recipe and flags. Raises ConfigError with every problem; warns of settings without effect."""
    built = read(arguments, make_parser(more=(BudgetArguments,)), DataArguments, BudgetArguments)
    if built.training.eval_strategy != "no" and built.data.eval_split is None and not built.data.eval_fraction:
        strategy = str(built.training.eval_strategy.value)
        raise ConfigError([f"eval_strategy: got {strategy!r}, but no rows are held out. Set eval_fraction or eval_split."])
    return built


def budget_of(arguments: list[str]) -> BudgetArguments:
    """The memory budget among arguments that `parse` has read."""
    from hf_memtune.cli.settings import values_of

    return BudgetArguments(**values_of(BudgetArguments, make_parser(more=(BudgetArguments,)).read(arguments, with_recipe=True)))


def read(arguments: list[str], parser, data: type, *more: type) -> Settings:
    """What `parser` makes of a recipe and flags; data: the class of its settings of data. Raises ConfigError with every problem.

    more: classes of further settings, whose problems and warnings are told as well.
    """
    from hf_memtune.cli.settings import build, values_of
    from hf_memtune.training.arguments import MemEfficientTrainingArguments

    namespace = parser.read(arguments, with_recipe=True)
    problems = parser.problems
    idle = parser.given & WITHOUT_MEANING.keys()
    problems += [f"{name}: has no meaning here ({WITHOUT_MEANING[name]}). Leave it out." for name in sorted(idle)]
    kinds = (ModelArguments, data, MemEfficientTrainingArguments)
    built = Settings(*(build(kind, values_of(kind, namespace), problems) for kind in kinds))
    further = [build(kind, values_of(kind, namespace), problems) for kind in more]
    if problems:
        raise ConfigError(problems)
    if built.model.reversible_adapters is not None and built.training.is_reversible:
        got = f"got {built.model.reversible_adapters!r} with reversible={built.training.reversible}"
        raise ConfigError([f"reversible_adapters: {got}. Leave out reversible: the folder says how they were trained."])
    for part in (built.model, built.data, *further):
        for message in part.ineffective():
            warnings.warn(message, stacklevel=2)
    return built


def make_trainer(settings: Settings):
    """The trainer, with model and data loaded, and the rows."""
    from hf_memtune.cli.data import prepare

    return trainer_on(settings, prepare, lambda rows: accuracy if rows.classes else None)


def trainer_on(settings: Settings, prepare: Callable, metrics_of: Callable):
    """The trainer and the rows. prepare: rows from settings of data and a tokenizer; metrics_of: compute_metrics, or None, from rows."""
    from transformers import set_seed

    from hf_memtune.cli.data import collator
    from hf_memtune.cli.model import load_tokenizer, load_trainable, with_reversible_adapters
    from hf_memtune.training.trainer import MemEfficientTrainer

    model, data, training = settings
    set_seed(training.seed)  # LoRA's first weights, and those of a new head, are random
    tokenizer = load_tokenizer(model)
    with training.main_process_first(desc="preparing the data"):
        rows = prepare(data, tokenizer)
    loaded = load_trainable(model, data, tokenizer, rows.classes)
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
    return trainer, rows


def held_out(trainer) -> dict[str, float]:
    """eval_loss, and eval_accuracy of a classifier, over the held-out rows: all tokens, plain forward. Empty without rows."""
    return {} if trainer.eval_dataset is None else trainer.evaluate()


def fit(trainer, settings: Settings, measure: Callable = held_out):
    """Measure, train, measure, save. Under FSDP2 transformers evaluates no model before its training."""
    from hf_memtune.cli.summary import StepTimes, Summary

    times, resumed = StepTimes(), settings.training.resume_from_checkpoint
    trainer.add_callback(times)
    before = {} if resumed or trainer.is_fsdp_enabled else measure(trainer)
    result = trainer.train(resume_from_checkpoint=resumed)
    logs = [*trainer.state.log_history, trainer.memory_callback.since_last_log()]
    after = measure(trainer)
    trainer.save_model()
    trainer.save_state()
    return Summary.of(trainer, logs, times.seconds, result.training_loss, (before, after))


def accuracy(prediction) -> dict[str, float]:
    """Share of rows whose likeliest class is the right one."""
    from hf_memtune.evaluation import load_metric

    return load_metric("accuracy").compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)
