"""From rows to tokens: what is masked, cut, held out and refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_memtune.cli import generate
from hf_memtune.cli.arguments import DataArguments
from hf_memtune.cli.data import IGNORED, collator, instruction_row, load_rows, prepare, text_row
from hf_memtune.cli.data.making import PLAIN_PROMPT, completion_row
from hf_memtune.errors import ConfigError
from tests.support.folders import tokenizer, write_rows

ROW = {"instruction": "name three colours", "input": "the sun", "output": "red green"}


def labelled(row: dict, words) -> str:
    return words.decode([label for label in row["labels"] if label != IGNORED])


def problems(data: DataArguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(data, tokenizer())
    return caught.value.problems


def test_the_prompt_is_masked_and_the_answer_with_its_end_is_not():
    words = tokenizer()
    row = instruction_row(ROW, DataArguments(), words)
    assert labelled(row, words) == "red green <eos>"
    assert words.decode(row["input_ids"]).startswith("### ") and "the sun" in words.decode(row["input_ids"])
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])


def test_the_chat_template_is_used_where_there_is_one():
    words = tokenizer(chat=True)
    row = instruction_row(ROW, DataArguments(), words)
    assert words.decode(row["input_ids"]) == "<bos> user name three colours the sun <eos> <bos> assistant red green <eos>"
    assert labelled(row, words) == "red green <eos>"


def test_a_missing_input_leaves_no_trace():
    words = tokenizer(chat=True)
    row = instruction_row({**ROW, "input": None}, DataArguments(), words)
    assert words.decode(row["input_ids"]) == "<bos> user name three colours <eos> <bos> assistant red green <eos>"


@pytest.mark.parametrize("given, expected", [(0, " 0"), (False, " false"), ("", ""), ([], "")])
def test_an_input_that_is_nought_is_an_input(given, expected):
    words = tokenizer(chat=True)
    row = instruction_row({**ROW, "input": given}, DataArguments(), words)
    said = f"<bos> user name three colours{expected} <eos> <bos> assistant red green <eos>"
    assert row["input_ids"] == words(said)["input_ids"] != words(said.replace("colours", "colours <unk>"))["input_ids"]


AROUND = {"OPT": "<eos> $A", "T5": "$A <eos>", "both": "<eos> $A <eos>", "neither": "$A"}


@pytest.mark.parametrize("way", AROUND)
def test_of_a_prompt_only_the_end_that_the_tokenizer_puts_is_left_out(way):
    """A beginning that is the end token too stays, and so does what the text itself has. `generate` asks with the same tokens."""
    words = tokenizer()
    words.bos_token = words.eos_token
    words.backend_tokenizer.post_processor = TemplateProcessing(single=AROUND[way], special_tokens=[("<eos>", words.eos_token_id)])
    row = completion_row({"prompt": "name <eos> three <eos>", "completion": "red"}, DataArguments(), words)
    begins = "<eos> " if AROUND[way].startswith("<eos>") else ""
    assert words.decode(row["input_ids"]) == begins + "name <eos> three <eos> red <eos>" and labelled(row, words) == "red <eos>"
    asked, whole = generate._tokens("name three", False, words), words(PLAIN_PROMPT.format(request="name three"))["input_ids"]
    assert asked == instruction_row({"instruction": "name three", "output": "red"}, DataArguments(), words)["input_ids"][:-2]
    assert (asked == whole) is not AROUND[way].endswith("<eos>") and asked[:6] == whole[:6]
    empty = completion_row({"prompt": "", "completion": "red"}, DataArguments(), words)
    assert words.decode(empty["input_ids"]) == begins + "red <eos>"


@pytest.mark.parametrize("has_end", [False, True])
def test_a_tokenizer_that_ends_texts_with_another_token_ends_the_answer_with_it(has_end):
    """As those of BERT's kind do, with [SEP] (<unk> here), some of which have no end token."""
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <unk>", special_tokens=[("<bos>", 2), ("<unk>", 1)])
    words.eos_token = "<eos>" if has_end else None
    end = "<unk> <eos>" if has_end else "<unk>"
    row = completion_row({"prompt": "name three", "completion": "red"}, DataArguments(), words)
    assert words.decode(row["input_ids"]) == f"<bos> name three red {end}" and labelled(row, words) == f"red {end}"
    assert words.decode(text_row({"text": "red"}, DataArguments(text_column="text"), words)["labels"]) == f"<bos> red {end}"
    asked = generate._tokens("name three", False, words)
    row = instruction_row({"instruction": "name three", "output": "red"}, DataArguments(), words)
    assert words.decode(row["input_ids"][len(asked) :]) == f"red {end}" and asked == row["input_ids"][: len(asked)]
    assert words.decode(generate._tokens("name three", True, words)) == "<bos> name three"
    assert generate.ends_of(words, None) == generate.ends_of(words, None, plain=True) == ([1, 3] if has_end else [1])


def test_plain_text_is_labelled_everywhere():
    words = tokenizer()
    row = text_row({"text": "red green"}, DataArguments(text_column="text"), words)
    assert row["labels"] == row["input_ids"] and labelled(row, words) == "red green <eos>"


def test_rows_are_cut_and_those_without_a_label_are_dropped(tmp_path):
    long = {**ROW, "instruction": "name " * 30}
    file = write_rows(tmp_path / "rows.jsonl", [ROW] * 6 + [long] * 4)
    rows = prepare(DataArguments(dataset_name=str(file), max_length=16, eval_fraction=0), tokenizer(chat=True))
    assert (len(rows.train), rows.dropped, rows.held_out) == (6, 4, None)
    assert max(map(len, rows.train["input_ids"])) <= 16


def test_the_same_rows_are_held_out_every_time(instructions):
    data = DataArguments(dataset_name=str(instructions), eval_fraction=0.25)
    first, second = (prepare(data, tokenizer()) for _ in range(2))
    assert len(first.held_out) == 6 and len(first.train) == 18
    assert first.held_out["input_ids"] == second.held_out["input_ids"]


def test_limits_on_rows(instructions):
    data = DataArguments(dataset_name=str(instructions), eval_fraction=0.25, max_train_rows=5, max_eval_rows=2)
    rows = prepare(data, tokenizer())
    assert (len(rows.train), len(rows.held_out)) == (5, 2)


@pytest.mark.parametrize("how", ["csv", "parquet", "json", "saved", "saved_dict", "folder"])
def test_every_form_of_data_gives_the_same_rows(how, instructions, tmp_path):
    import datasets

    rows = load_rows(DataArguments(dataset_name=str(instructions)), "train")
    target = tmp_path / ("data" if how in ("saved", "saved_dict", "folder") else f"data.{how}")
    if how == "folder":
        target.mkdir()
        rows.to_json(target / "train.jsonl")
    elif how.startswith("saved"):
        (datasets.DatasetDict(train=rows) if how == "saved_dict" else rows).save_to_disk(target)
    else:
        getattr(rows, f"to_{how}")(target)
    found = load_rows(DataArguments(dataset_name=str(target)), "train")
    assert found["output"] == rows["output"]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"dataset_name": "absent.jsonl"}, ["does not exist"]),
        ({"dataset_split": "absent"}, ["absent"]),
        ({"output_column": "a", "instruction_column": "q"}, ["no column 'q', expected one of: instruction", "no column 'a'"]),
        ({"text_column": "body"}, ["no column 'body'"]),
        ({"max_length": 2}, ["none of the 22 rows to train on has a labelled token"]),
        ({"task": "sequence_classification"}, ["no column 'text'", "no column 'label'"]),
    ],
)
def test_data_that_cannot_be_used(settings, expected, instructions):
    found = problems(DataArguments(**{"dataset_name": str(instructions), "eval_fraction": 0.1, **settings}))
    assert len(found) == len(expected)
    assert all(part in message for part, message in zip(expected, found, strict=True))


def test_a_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "rows.xml").write_text("<rows/>")
    assert "got a .xml file" in problems(DataArguments(dataset_name="rows.xml"))[0]


@pytest.mark.parametrize("labels, expected", [([0, 1], [0, 1]), (["sad", "glad"], ["glad", "sad"]), ([10, 9], [9, 10])])
def test_classes_are_numbered_in_order(labels, expected, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a film", "label": labels[n % 2]} for n in range(8)])
    rows = prepare(DataArguments(dataset_name=str(file), task="sequence_classification", eval_fraction=0), tokenizer())
    assert rows.classes == expected
    assert [rows.classes[number] for number in rows.train["labels"]] == [labels[n % 2] for n in range(8)]


@pytest.mark.parametrize("labels, expected", [([0.5, 1.0], "the value"), ([1, 1], "1 class"), ([None, 1], "the value None")])
def test_labels_that_are_no_classes(labels, expected, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a film", "label": labels[n % 2]} for n in range(8)])
    (found,) = problems(DataArguments(dataset_name=str(file), task="sequence_classification", eval_fraction=0))
    assert found.startswith("label_column") and expected in found


def test_padding_carries_no_label(instructions):
    words = tokenizer()
    data = DataArguments(dataset_name=str(instructions), eval_fraction=0)
    rows = prepare(data, words).train
    batch = collator(data, words)([rows[n] for n in range(4)])
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize("task", ["auto", "sequence_classification"])
def test_rows_are_padded_on_the_right_whatever_the_tokenizer_was_saved_for(task, instructions, reviews):
    """Models that number tokens from the start of the row would number padding, so that a row had another loss beside a longer one."""
    words, left = tokenizer(), tokenizer()
    left.padding_side = "left"
    data = DataArguments(dataset_name=str(instructions if task == "auto" else reviews), task=task, eval_fraction=0)
    rows = prepare(data, words)
    given = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in list(rows.train)[:4]]
    given[0] = {name: value[:-2] if isinstance(value, list) else value for name, value in given[0].items()}
    found, expected = (collator(rows.data, each)([dict(row) for row in given]) for each in (left, words))
    assert (expected["attention_mask"][0, -2:] == 0).all() and left.padding_side == "left"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    padded = left.pad([{"input_ids": row["input_ids"]} for row in given], return_tensors="pt")
    assert not torch.equal(padded["input_ids"], expected["input_ids"])  # sibling
