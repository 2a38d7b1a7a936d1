"""What the commands take beside training arguments: the model, LoRA, the data. Flat fields, as flags and YAML keys.

Names a user may expect are aliases: `--model` for `--model_name_or_path`, `--dataset` for `--dataset_name`.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from hf_memtune.settings.protocol import setting

CLASSES = "sequence_classification"
TASKS = ("auto", "causal_lm", CLASSES)
COLUMNS = ("instruction_column", "input_column", "output_column")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ALL_LINEAR = "all-linear"


def changed(settings, names) -> list[str]:
    """Those of `names` whose value is not the default."""
    defaults = type(settings)()
    return [name for name in names if getattr(settings, name) != getattr(defaults, name)]


def problems_of_max_length(settings) -> list[str]:
    """What is wrong with max_length: of a row of one token nothing is learned."""
    return [] if settings.max_length >= 2 else [f"max_length: got {settings.max_length}, expected 2 tokens or more."]


def problems_of_row_limits(settings) -> list[str]:
    """What is wrong with max_train_rows and max_eval_rows, which may be None."""
    limits = {name: getattr(settings, name) for name in ("max_train_rows", "max_eval_rows")}
    return [f"{name}: got {rows}, expected 1 row or more." for name, rows in limits.items() if rows is not None and rows < 1]


@dataclass
class ModelSource:
    """Which model, and how it is loaded."""

    _argument_group_name = "model"

    model_name_or_path: str | None = setting(
        None, "Required. Folder of a model (weights, config, tokenizer), or its name on the hub.", aliases=["--model"]
    )
    dtype: str = setting(
        "auto",
        "Number format of the weights: auto (as they are stored), float32 (4 bytes a parameter), bfloat16 or float16 (2 bytes).",
        choices=DTYPES,
    )
    attn_implementation: str | None = setting(
        None, "Attention kernel: sdpa, eager, flash_attention_2, ... Default: what transformers chooses for the model."
    )
    reversible_adapters: str | None = setting(
        None,
        "Folder of adapters that were trained with reversible on this model, to put into it. Default: none.",
    )

    def problems(self) -> list[str]:
        if self.model_name_or_path is None:
            return ["model_name_or_path: got nothing, expected a folder or a hub name (--model_name_or_path, or --model)."]
        if self.reversible_adapters is not None and not Path(self.reversible_adapters).is_dir():
            return [f"reversible_adapters: {self.reversible_adapters!r} is not a folder."]
        return []

    def ineffective(self) -> dict[str, str]:
        return {}


@dataclass
class ModelArguments(ModelSource):
    """The model, and the adapter that is trained instead of it."""

    lora_r: int = setting(0, "Rank of the LoRA adapters. Larger: more trainable parameters. 0 trains all parameters of the model instead.")
    lora_alpha: int = setting(16, "LoRA scaling: updates are multiplied by lora_alpha / lora_r. Larger: larger updates.")
    lora_dropout: float = setting(0.0, "Probability, in [0, 1), with which an input of an adapter is dropped in training.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": f"Modules that get an adapter, by the end of their names; {ALL_LINEAR}: every linear layer but the head."},
    )
    load_in_4bit: bool = setting(
        False,
        "Load the frozen weights in 4 bits (NF4 of bitsandbytes, about 0.6 bytes a parameter): QLoRA. Needs lora_r.",
    )

    def problems(self) -> list[str]:
        checks = [
            (self.lora_r >= 0, f"lora_r: got {self.lora_r}, expected a rank of 1 or more, or 0 for full fine-tuning."),
            (self.lora_alpha > 0, f"lora_alpha: got {self.lora_alpha}, expected 1 or more."),
            (0 <= self.lora_dropout < 1, f"lora_dropout: got {self.lora_dropout}, expected a probability in [0, 1)."),
            (
                self.lora_r > 0 or not self.load_in_4bit,
                "load_in_4bit: 4-bit weights are frozen, and transformers' Trainer trains such a model through PEFT adapters alone, so "
                "lora_r=0 leaves nothing to train; adapters of reversible layers do not count. Set lora_r, for example 16 (and "
                "adapter_rank=0, to train LoRA alone inside reversible layers).",
            ),
        ]
        return super().problems() + [message for holds, message in checks if not holds]

    def ineffective(self) -> dict[str, str]:
        if self.lora_r:
            return {}
        return dict.fromkeys(changed(self, ("lora_alpha", "lora_dropout", "lora_target_modules")), "with lora_r=0 (full fine-tuning)")


@dataclass
class DataSource:
    """Which data, and how a row becomes tokens."""

    _argument_group_name = "data"

    dataset_name: str | None = setting(
        None,
        "Data: a json, jsonl, csv, parquet or txt file (a line a row), or one with .gz, a folder of such files, a folder written by save_to_disk, or a hub name. Rows "
        "are known by their columns: messages, conversations, prompt and completion, instruction and output, text, or text and label.",
        aliases=["--dataset"],
    )
    dataset_config: str | None = setting(None, "Configuration of a data set that has several, as on the hub.")
    dataset_split: str = setting("train", "Split to use; a slice such as train[:1000] works except for folders of save_to_disk.")
    task: str = setting(
        "auto",
        "causal_lm: next-token prediction on chats, instructions or plain text; sequence_classification: one class a row; auto: the latter for "
        "rows with text and a label, else the former.",
        choices=TASKS,
    )
    max_length: int = setting(
        1024,
        "Most tokens of a row; what is beyond is cut off. Larger: more memory and time a row. Rows left without a label go. Unless given, no more than "
        "the model has positions for.",
    )
    instruction_column: str = setting("instruction", "causal_lm: column of the request. With the input, it is the prompt, masked out.")
    input_column: str = setting("input", "causal_lm: column of further text of the request, may be missing or empty.")
    output_column: str = setting("output", "causal_lm: column of the wanted answer, the tokens that carry a label.")
    text_column: str | None = setting(
        None,
        "causal_lm: column of plain text, all of whose tokens carry a label, in place of the three above (default: none). "
        "sequence_classification: column of the text to classify (default: text).",
    )
    label_column: str = setting("label", "sequence_classification: column of the class, a whole number or a name.")
    assistant_only_loss: bool = setting(
        True, "causal_lm: learn from the answers alone, of chats from every turn of the assistant; False: from every token."
    )
    chat_template_path: str | None = setting(
        None, "A Jinja file, or a model (folder or hub name), whose chat template is used and saved. Default: that of the tokenizer."
    )
    packing: bool = setting(
        False,
        "causal_lm: train on rows of up to max_length tokens made of whole rows (trl's best fit decreasing), for models that keep them apart. Less "
        "padding; needs trl (pip install -e '.[sft]').",
    )

    def problems(self) -> list[str]:
        found = problems_of_max_length(self)
        if self.dataset_name is None:
            found.append("dataset_name: got nothing, expected a file, a folder or a hub name (--dataset_name, or --dataset).")
        if self.packing and find_spec("trl") is None:
            found.append("packing: got True, but trl is not installed. pip install -e '.[sft]', or leave it out.")
        return found

    def ineffective(self) -> dict[str, str]:
        classifies = self.task == CLASSES
        idle = ["label_column"] if self.task == "causal_lm" else []
        if classifies or self.text_column is not None:
            idle += [*COLUMNS, "assistant_only_loss", "chat_template_path"]
        if classifies:
            idle.append("packing")
        reason = f"task={self.task}" + ("" if classifies or self.text_column is None else f", text_column={self.text_column}")
        return dict.fromkeys(changed(self, idle), f"with {reason}")


@dataclass
class DataArguments(DataSource):
    """The data to train on, and what of it is held out."""

    eval_split: str | None = setting(None, "Split held out to measure the loss. Default: eval_fraction of the rows to train on.")
    eval_fraction: float = setting(
        0.05,
        "Fraction of the rows, in [0, 1), held out to measure the loss, the same rows for every seed; 0 holds out none. "
        "Without effect where eval_split is given.",
    )
    max_train_rows: int | None = setting(None, "Train on this many rows at most, the first ones after holding out. Default: all.")
    max_eval_rows: int | None = setting(200, "Measure the held-out loss on this many rows at most.")
    show_rows: int = setting(2, "Rows to print before training as they will be learned, with what carries a loss; 0 prints none.")

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out, on which `train` measures before and after training."""
        return self.eval_split is not None or self.eval_fraction > 0

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 <= self.eval_fraction < 1:
            found.append(f"eval_fraction: got {self.eval_fraction}, expected a fraction in [0, 1).")
        if self.show_rows < 0:
            found.append(f"show_rows: got {self.show_rows}, expected 0 or more.")
        return found + problems_of_row_limits(self)

    def ineffective(self) -> dict[str, str]:
        found = super().ineffective()
        if self.eval_split is not None:
            found |= dict.fromkeys(changed(self, ["eval_fraction"]), "with eval_split")
        elif not self.eval_fraction:
            found |= dict.fromkeys(changed(self, ["max_eval_rows"]), "with eval_fraction=0")
        return found
