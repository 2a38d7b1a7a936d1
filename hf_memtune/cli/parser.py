"""The parser of every command that trains, or predicts what training would need."""

from hf_memtune.cli.arguments import DataArguments, ModelArguments
from hf_memtune.cli.checks import checkpoint
from hf_memtune.cli.essentials import PAGES

OUTPUT_DIR = "./out"

# Fields of TrainingArguments that Trainer leaves to scripts, and that mean nothing in these commands.
WITHOUT_MEANING = {
    "do_train": "this command always trains",
    "do_eval": "held-out rows are always evaluated, before and after training; eval_strategy adds evaluations in between",
    "do_predict": "this command predicts nothing",
}
# Not listed by --help-all: what belongs to settings that every method refuses, and older names of other settings.
UNLISTED = ("torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "gradient_checkpointing", "gradient_checkpointing_kwargs")


def rows_of_evaluation(training, given, rows: int | None = None) -> int:
    """Rows of a batch that `train` evaluates: those that were given, else transformers' default, but no more than it trains on at a time.

    Where a row is all that fits in training, more in evaluation would not. given: names of settings that were given; rows: of a
    micro-batch of training; None: as the settings say.
    """
    rows = training.per_device_train_batch_size if rows is None else rows
    default = training.per_device_eval_batch_size
    return default if "per_device_eval_batch_size" in given else min(default, rows)


def make_parser(command: str = "train", data: type = DataArguments, more: tuple[type, ...] = ()):
    """`more`, the settings of the model, the data, the strategies and Trainer, in this order."""
    from transformers import TrainingArguments

    from hf_memtune.cli.settings import Parser
    from hf_memtune.levers.table import OF_METHODS
    from hf_memtune.training.arguments import MemEfficientArgumentsMixin

    class Strategies(MemEfficientArgumentsMixin):
        _argument_group_name = "strategies (exact streaming, token seeking, reversible layers, checkpointing) and measuring"

    class Training(TrainingArguments):
        _argument_group_name = "training (transformers.TrainingArguments)"

    page = PAGES[command]
    kinds = [*more, ModelArguments, data, Strategies, Training]
    parser = Parser(kinds, usage=f"hf-memtune {command} {page.usage}", description=page.about)
    parser.set_defaults(output_dir=OUTPUT_DIR, logging_steps=10)
    parser.takes_several("report_to")
    parser.may_stand_alone("resume_from_checkpoint", True, checkpoint)
    for name in ("checkpointing", "checkpointing_kwargs"):
        parser.one_setting(f"gradient_{name}", f"activation_{name}")
    parser.unlist({*WITHOUT_MEANING, *OF_METHODS, *UNLISTED})
    return parser
