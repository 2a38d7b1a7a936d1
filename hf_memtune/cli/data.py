"""From files or a hub name to tokenised rows, through `datasets`, which keeps the result on disk."""

from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from hf_memtune.cli.arguments import DataArguments, DataSource
from hf_memtune.errors import ConfigError

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
IGNORED = -100
HOLD_OUT_SEED = 0  # not the seed of training: runs with different seeds are measured on the same rows
PLAIN_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"  # for tokenizers without a chat template


@dataclass
class Rows:
    """Tokenised rows. dropped: rows without a labelled token after cutting. classes: of sequence classification, in order."""

    train: Any
    held_out: Any | None
    dropped: int
    classes: list | None


def load_rows(data: DataSource, split: str):
    """The rows of one split, as they are stored."""
    import datasets

    path = Path(data.dataset_name)
    if path.suffix in BUILDERS and not path.is_file() and not path.is_dir():
        raise ConfigError([f"dataset_name: {data.dataset_name!r} does not exist."])
    if path.is_file() and path.suffix not in BUILDERS:
        raise ConfigError([f"dataset_name: got a {path.suffix or 'nameless'} file, expected one of {', '.join(BUILDERS)}."])
    try:
        if path.is_file():
            return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _saved_rows(datasets.load_from_disk(path), split)
        return datasets.load_dataset(data.dataset_name, data.dataset_config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError([f"dataset_name: {data.dataset_name!r}, split {split!r}: {error}"]) from error


def _saved_rows(saved, split: str):
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"the folder has the splits {', '.join(splits)}")
    return splits[split]


def prepare(data: DataArguments, tokenizer) -> Rows:
    """Rows to train on and rows held out, tokenised."""
    train, held_out = _split(data)
    check_columns(data, train.column_names)
    classes = class_names(data, train)
    train, dropped = tokenised(train, data, tokenizer, classes)
    if held_out is not None:
        held_out, more = tokenised(held_out, data, tokenizer, classes)
        dropped += more
    return Rows(train, held_out, dropped, classes)


def _split(data: DataArguments):
    rows, held_out = load_rows(data, data.dataset_split), None
    if data.eval_split is not None:
        held_out = load_rows(data, data.eval_split)
    elif data.eval_fraction:
        if len(rows) < 2:
            raise ConfigError([f"eval_fraction: cannot hold out any of {len(rows)} row(s). Set it to 0."])
        count = min(max(1, round(len(rows) * data.eval_fraction)), len(rows) - 1)
        parts = rows.train_test_split(test_size=count, seed=HOLD_OUT_SEED)
        rows, held_out = parts["train"], parts["test"]
    if held_out is not None:
        held_out = _first(held_out, data.max_eval_rows)
    return _first(rows, data.max_train_rows), held_out


def _first(rows, count: int | None):
    return rows if count is None or count >= len(rows) else rows.select(range(count))


def check_columns(data: DataSource, columns: list[str]) -> None:
    """Raises ConfigError for every column that the settings name and the rows lack."""
    if data.task == "sequence_classification":
        wanted = {"text_column": text_column(data), "label_column": data.label_column}
    elif data.text_column is not None:
        wanted = {"text_column": data.text_column}
    else:
        wanted = {"instruction_column": data.instruction_column, "output_column": data.output_column}
    missing = [
        f"{setting}: the data has no column {name!r}, expected one of: {', '.join(columns)}."
        for setting, name in wanted.items()
        if name not in columns
    ]
    if missing:
        raise ConfigError(missing)


def text_column(data: DataSource) -> str:
    return data.text_column or "text"


def class_names(data: DataSource, rows) -> list | None:
    """Every class of the rows, in the order of their numbers; None where the task has none."""
    if data.task != "sequence_classification":
        return None
    named = getattr(rows.features[data.label_column], "names", None)
    found = named or rows.unique(data.label_column)
    wrong = [label for label in found if not isinstance(label, (int, str))]
    if wrong or len(found) < 2:
        got = f"the value {wrong[0]!r}" if wrong else f"{len(found)} class(es)"
        raise ConfigError([f"label_column: got {got} in {data.label_column!r}, expected whole numbers or names, two or more."])
    return found if named else sorted(found)


def tokenised(rows, data: DataSource, tokenizer, classes: list | None):
    """Rows as tokens, and how many were dropped because nothing in them carries a label. At least one remains."""
    make = {"sequence_classification": classified_row, "causal_lm": text_row if data.text_column else instruction_row}[data.task]
    options = {"data": data, "tokenizer": tokenizer} | ({"classes": _numbers(rows, data, classes)} if classes else {})
    done = rows.map(make, fn_kwargs=options, remove_columns=rows.column_names, desc="Tokenising")
    if classes:
        return done, 0
    kept = done.filter(_has_label, input_columns="labels", desc="Dropping rows without a label")
    if not len(kept):
        raise ConfigError([f"max_length: no row has a labelled token within {data.max_length} tokens. Raise it."])
    return kept, len(done) - len(kept)


def _numbers(rows, data: DataSource, classes: list) -> dict:
    """Class number by stored value. Raises ConfigError for a class that the rows to train on lack."""
    if getattr(rows.features[data.label_column], "names", None):
        return {number: number for number in range(len(classes))}
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = [label for label in rows.unique(data.label_column) if label not in numbers]
    if unknown:
        raise ConfigError([f"label_column: held-out rows have the class {unknown[0]!r}, rows to train on only {classes}."])
    return numbers


def _has_label(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # nothing predicts the first token


def text_row(row: dict, data: DataSource, tokenizer) -> dict:
    """Plain text: every token carries a label, the end of the text too."""
    ids = tokenizer(str(row[data.text_column] or ""))["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return _cut(ids, 0, data.max_length)


def instruction_row(row: dict, data: DataSource, tokenizer) -> dict:
    """A request and its answer; the request is masked out of the loss."""
    request = "\n\n".join(str(row[name]) for name in (data.instruction_column, data.input_column) if row.get(name))
    answer = str(row[data.output_column] or "")
    if tokenizer.chat_template is None:
        prompt = tokenizer(PLAIN_PROMPT.format(request=request))["input_ids"]
        prompt = [token for token in prompt if token != tokenizer.eos_token_id]  # some tokenizers end every text
        rest = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rest += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    else:
        parts = _conversation(tokenizer, request, answer)
        prompt, rest = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    return _cut(prompt + rest, len(prompt), data.max_length)


def _conversation(tokenizer, request: str, answer: str) -> tuple[str, str]:
    """The text up to the answer and the rest, as the chat template writes them."""
    turn, reply = {"role": "user", "content": request}, {"role": "assistant", "content": answer}
    prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([turn, reply], tokenize=False)
    # some templates open the answer differently when it is known: what both share is the prompt
    shared = len(commonprefix([prompt, whole]))
    return whole[:shared], whole[shared:]


def _cut(ids: list[int], prompt_tokens: int, max_length: int) -> dict:
    labels = [IGNORED] * prompt_tokens + ids[prompt_tokens:]
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def classified_row(row: dict, data: DataSource, tokenizer, classes: dict) -> dict:
    """A text and the number of its class."""
    tokens = tokenizer(str(row[text_column(data)] or ""), truncation=True, max_length=data.max_length)
    return {**tokens, "labels": classes[row[data.label_column]]}


def collator(data: DataSource, tokenizer):
    """Pads a batch to its longest row; padded labels are -100."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if data.task == "sequence_classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
