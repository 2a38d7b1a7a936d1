"""What `hf-memtune COMMAND --help` shows: the settings that matter, in short words, grouped by purpose.

Written out here, and not read from the settings, because those of training come with transformers and torch, which take seconds to load.
A test compares every line with the parser of its command. `--help-all` lists what the parser has.
"""

from typing import Any, NamedTuple

MUST = object()  # in place of a default: the setting has to be given


class Line(NamedTuple):
    """One setting. value: what stands for its value, or its choices; says: what it does; default: None where `says` tells."""

    flag: str
    value: str
    says: str
    default: Any = None


class Page(NamedTuple):
    """The help of one command. groups: (purpose, settings)."""

    usage: str
    about: str
    groups: tuple[tuple[str, tuple[Line, ...]], ...]


MODEL = Line("model", "M", "folder of a model, or its name on the hub", MUST)
DTYPE = Line("dtype", "auto|float32|bfloat16|float16", "number format of the weights; auto: as they are stored", "auto")
REVERSIBLE_ADAPTERS = Line("reversible_adapters", "FOLDER", "put in adapters that were trained with --reversible")
DATASET = Line("dataset", "D", "a file (json, jsonl, csv, parquet, txt), a folder, or a name on the hub: chats, instructions, text", MUST)
SPLIT = Line("dataset_split", "SPLIT", "split to use; train[:1000] takes a part", "train")
TASK = Line("task", "auto|causal_lm|sequence_classification", "what the model learns; auto: by the columns", "auto")
MAX_LENGTH = Line("max_length", "TOKENS", "longest row; the rest is cut off", 1024)
TEXT_COLUMN = Line("text_column", "NAME", "column of plain text, for data without instructions")
SEED = Line("seed", "N", "seed of all random numbers", 42)

_MODEL = ("model", (MODEL, DTYPE))
_LEARNED = (
    "what is trained",
    (
        Line("lora_r", "RANK", "train LoRA adapters of this rank; 0 trains all weights", 0),
        Line("lora_target_modules", "NAME ...", "modules that get an adapter", ["all-linear"]),
        Line("load_in_4bit", "", "keep the frozen weights in 4 bits (QLoRA)", False),
    ),
)
_BUDGET = Line("budget", "BYTES", "change settings until a step is predicted to fit, for example 8GiB")
_GPU = Line("gpu", "CARD", "in place of --budget: rtx4090, a100-80gb, ...")
_ROOM = ("memory", (Line("budget", "BYTES", "memory for the tensors of a step, for example 8GiB"), _GPU))
_SEEKING = (
    Line("token_ratio", "R", "share of the tokens to keep; 0.3, or that of the preset"),
    Line("preset", "tokenseek|tokentune", "settings of a published method"),
)
_STRATEGIES = (
    "memory strategies",
    (
        Line("activation_checkpointing", "", "recompute activations; the same gradients", False),
        Line("checkpoint_levels", "2", "recompute in two levels: less memory, more time"),
        Line("sequence_chunk_size", "TOKENS", "run each row in chunks of this length, or auto (in training); the same gradients"),
        Line("keep_attention_outputs", "", "with chunks: compute no attention again; sooner on long rows, more memory", False),
        Line("kv_offload", "", "with chunks: keys and values in host memory; by layers, the inputs of the layers", False),
        Line("token_seeking", "", "gradient through a part of the tokens, by default a random one; approximate", False),
        *_SEEKING,
        Line("reversible", "KIND", "reversible layers with adapters: no activations are kept", "none"),
    ),
)
_TRAINING = (
    "training",
    (
        Line("learning_rate", "LR", "largest learning rate", 5e-5),
        Line("num_train_epochs", "N", "passes over the data", 3.0),
        Line("max_steps", "N", "stop after this many steps, in place of epochs", -1),
        Line("per_device_train_batch_size", "ROWS", "rows at a time on each device", 8),
        Line("gradient_accumulation_steps", "N", "batches for one step", 1),
        Line("bf16", "", "compute in bfloat16 (mixed precision)", False),
        Line("optim", "NAME", "optimizer: adamw_torch, adafactor, paged_adamw_8bit, ...", "adamw_torch_fused"),
        SEED,
    ),
)
_OUTPUT = (
    "output",
    (
        Line("output_dir", "FOLDER", "where the model and its numbers are written", "./out"),
        Line("eval_strategy", "no|steps|epoch", "when to measure during training", "no"),
        Line("save_steps", "N", "steps between checkpoints", 500),
        Line("logging_steps", "N", "steps between log lines", 10),
        Line("report_to", "NAME ...", "tensorboard, wandb, ...", "none"),
        Line("resume_from_checkpoint", "[FOLDER]", "go on from a checkpoint; without a folder, from the latest"),
    ),
)
_HELD_OUT = (
    Line("eval_fraction", "F", "share of the rows held out to measure the loss", 0.05),
    Line("per_device_eval_batch_size", "ROWS", "rows at a time where it is measured; unless given, no more than in training", 8),
)
_DATA = (
    "data",
    (
        DATASET,
        SPLIT,
        TASK,
        TEXT_COLUMN,
        MAX_LENGTH,
        Line("assistant_only_loss", "true|false", "learn from answers alone", True),
        Line("packing", "", "whole rows together in rows of max_length", False),
        *_HELD_OUT,
    ),
)
_PREDICTED = (
    "prediction",
    (
        Line("sequence_length", "TOKENS", "tokens of the longest row; --max_length unless given"),
        Line("config_overrides", "NAME=N,...", "sizes that replace those of the model's config"),
        Line("json", "", "print JSON in place of a table", False),
    ),
)
_CHOSEN_MODEL = ("model", (MODEL, DTYPE, REVERSIBLE_ADAPTERS))
_STEP = (
    "training",
    tuple(line for line in _TRAINING[1] if line.flag in ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "optim"))
    + _HELD_OUT,
)

_WITH_BUDGET = (_STRATEGIES[0], (_BUDGET, _GPU, *_STRATEGIES[1]))
_RECIPE = "RECIPE.yaml holds settings by these names; flags go over it."

PAGES = {
    "train": Page(
        "[RECIPE.yaml] --model M --dataset D [--name value ...]",
        f"Fine-tune a model. {_RECIPE}",
        (_MODEL, _DATA, _LEARNED, _WITH_BUDGET, _TRAINING, _OUTPUT),
    ),
    "estimate": Page(
        "[RECIPE.yaml] --model M [--name value ...]",
        f"Predict the memory of a training step, without a GPU, weights or data. Takes the settings of train. {_RECIPE}",
        (_ROOM, _PREDICTED, (_MODEL[0], (*_MODEL[1], MAX_LENGTH)), _LEARNED, _STRATEGIES, _STEP),
    ),
    "longest": Page(
        "[RECIPE.yaml] --model M (--budget BYTES | --gpu CARD) [--name value ...]",
        f"Find the longest row, and the largest batch, that fit a memory budget. Takes the settings of train. {_RECIPE}",
        (_ROOM, _PREDICTED, (_MODEL[0], (*_MODEL[1], MAX_LENGTH)), _LEARNED, _STRATEGIES, _STEP),
    ),
    "plan": Page(
        "[RECIPE.yaml] --model M (--budget BYTES | --gpu CARD) [--name value ...]",
        f"Find settings that fit a memory budget, and write them as a recipe for train. Takes the settings of train. {_RECIPE}",
        (
            (
                "plan",
                (
                    *_ROOM[1],
                    Line("allow_approximate", "true|false", "whether token seeking may be used", True),
                    Line("out", "FILE.yaml", "recipe to write", "plan.yaml"),
                ),
            ),
            _PREDICTED,
            (_MODEL[0], (*_MODEL[1], MAX_LENGTH)),
            _LEARNED,
            _STEP,
        ),
    ),
    "evaluate": Page(
        "--model M (--dataset D | --tasks NAME,...) [--name value ...]",
        "Measure the loss, or scores on tasks of lm-eval, of a model, of a LoRA folder (as --model), or with reversible adapters.",
        (
            _CHOSEN_MODEL,
            ("data", (DATASET._replace(default=None), SPLIT, TASK, TEXT_COLUMN, MAX_LENGTH)),
            (
                "tasks, in place of data",
                (
                    Line("tasks", "NAME,...", "tasks of lm-eval: sciq,piqa"),
                    Line("num_fewshot", "N", "examples before each question; as each task says unless given"),
                    Line("limit", "N", "score the first rows of each task only"),
                    Line("tasks_folder", "FOLDER", "task files of your own, as lm-eval reads them"),
                    Line("out", "FILE.json", "scores to write; a picture goes beside it", "scores.json"),
                ),
            ),
            (
                "measuring",
                (
                    Line("max_eval_rows", "N", "measure on the first rows only"),
                    Line("per_device_eval_batch_size", "ROWS", "rows at a time", 8),
                ),
            ),
        ),
    ),
    "generate": Page(
        "--model M --prompt TEXT [TEXT ...] [--name value ...]",
        "Answer prompts with a model, with a LoRA folder (as --model), or with reversible adapters.",
        (
            (
                "prompts",
                (
                    Line("prompt", "TEXT ...", "texts to answer", MUST),
                    Line("plain", "", "continue the texts as they are, not as instructions", False),
                    Line("max_new_tokens", "N", "longest answer", 128),
                    Line("temperature", "T", "0 takes the likeliest token each time", 0.0),
                    SEED._replace(default=0, says="seed of sampling"),
                ),
            ),
            _CHOSEN_MODEL,
        ),
    ),
    "merge": Page(
        "--model LORA_FOLDER --output_dir NEW_FOLDER [--base_model M]",
        "Add LoRA adapters to the weights of their model, and write a plain model that needs no adapters.",
        (
            (
                "merging",
                (
                    Line("model", "FOLDER", "LoRA adapters, as train writes them", MUST),
                    Line("output_dir", "FOLDER", "where the plain model is written; must be new or empty", MUST),
                    Line("base_model", "M", "the model they were trained on; as the adapters name it unless given"),
                ),
            ),
        ),
    ),
    "glue": Page(
        "[RECIPE.yaml] --model M --task_name TASK [--name value ...]",
        f"Fine-tune an encoder on a task of GLUE, or on sentences and labels of your own. {_RECIPE}",
        (
            _MODEL,
            (
                "data",
                (
                    Line("task_name", "TASK", "task of GLUE: cola, sst2, mrpc, ..."),
                    Line("train_file", "FILE", "rows of your own: csv, json, jsonl or parquet"),
                    Line("validation_file", "FILE ...", "held-out rows of your own"),
                    Line("sentence_column", "NAME", "column of the text", "sentence"),
                    Line("label_column", "NAME", "column of the label", "label"),
                    MAX_LENGTH._replace(default=128),
                ),
            ),
            _LEARNED,
            _STRATEGIES,
            _TRAINING,
            _OUTPUT,
        ),
    ),
    "qa": Page(
        "[RECIPE.yaml] --model M --task_name TASK [--name value ...]",
        f"Fine-tune a language model on one of five question-answering tasks, and score it by lm-eval before and after. {_RECIPE}",
        (
            _MODEL,
            (
                "data",
                (
                    Line("task_name", "openbookqa|piqa|arc_easy|arc_challenge|sciq", "the task", MUST),
                    Line("train_file", "FILE", "rows of your own, in the columns of the task"),
                    Line("test_file", "FILE", "rows of your own that are scored"),
                    Line("scored_split", "SPLIT", "split of the hub that is scored; lm-eval's unless given"),
                    MAX_LENGTH._replace(default=128, says="longest row; its beginning is cut off"),
                ),
            ),
            _LEARNED,
            _STRATEGIES,
            _TRAINING,
            _OUTPUT,
        ),
    ),
    "tokens": Page(
        "--model M (--text FILE | --dataset D [--index N ... | --compare SCORER SCORER ...]) [--name value ...]",
        "Show which tokens of an example are scored how, and which token seeking would keep; or compare scorers over a data set.",
        (
            (
                "examples",
                (
                    Line("text", "FILE", "a text file to show, in place of a data set"),
                    Line("index", "N ...", "rows of the data set to show, from 0", [0]),
                    Line("compare", "SCORER ...", "compare scorers over a data set: combined context gradient loss random"),
                    Line("rows", "N", "with --compare: rows to compare on; 64 unless given"),
                    Line("out", "FILE.html", "page to write; tokens.html, or scorers.html with --compare"),
                ),
            ),
            _CHOSEN_MODEL,
            ("data", (DATASET._replace(default=None), SPLIT, TASK, TEXT_COLUMN, MAX_LENGTH)),
            ("token seeking", (*_SEEKING, Line("token_scorer", "NAME", "how tokens are scored: random, combined, ..."))),
        ),
    ),
}
