"""The parser of every command that trains, or predicts what training would need."""

from hf_memtune.cli.arguments import DataArguments, ModelArguments

OUTPUT_DIR = "./out"
USAGE = "hf-memtune train [RECIPE.yaml] [--name value ...]"
ABOUT = "Fine-tune a model. RECIPE.yaml holds settings by the names below; flags go over it."


def make_parser(data: type = DataArguments, usage: str = USAGE, about: str = ABOUT, more: tuple[type, ...] = ()):
    """`more`, the settings of the model, the data, the strategies and Trainer, in this order."""
    from transformers import TrainingArguments

    from hf_memtune.cli.settings import Parser
    from hf_memtune.training.arguments import MemEfficientArgumentsMixin

    class Strategies(MemEfficientArgumentsMixin):
        _argument_group_name = "strategies (exact streaming, token seeking, reversible layers, checkpointing) and measuring"

    class Training(TrainingArguments):
        _argument_group_name = "training (transformers.TrainingArguments)"

    parser = Parser([*more, ModelArguments, data, Strategies, Training], usage=usage, description=about)
    parser.set_defaults(output_dir=OUTPUT_DIR, logging_steps=10)
    return parser
