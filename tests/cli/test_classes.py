"""Classes of a trained classifier: rows are labelled by its names and numbers, in training, in evaluation and merged, or are refused."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_memtune.cli import evaluate, main
from hf_memtune.cli.arguments import CLASSES, DataSource, ModelSource
from hf_memtune.cli.data.classes import known_classes, relabelled
from hf_memtune.errors import ConfigError
from tests.support.folders import write_rows
from tests.support.train import REVERSIBLE, arguments

NAMES = ["positive", "negative", "neutral"]  # in another order than that of their letters
TEXTS = {"positive": "good film sun", "negative": "bad film sea", "neutral": "the film"}
LEARNING = "--max_steps 30 --learning_rate 0.02 --per_device_train_batch_size 4 --show_rows 0 --max_length 128".split()


def measured(*flags):
    return evaluate.measured(evaluate.parse([str(flag) for flag in flags]))


def rows_of(path, label, names=NAMES):
    return write_rows(path, [{"text": TEXTS[name], "label": label(name)} for name in names] * 10)


@pytest.fixture
def named(tmp_path):
    """Rows whose data set has names for its numbers."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    rows = [{"text": TEXTS[name], "label": number} for number, name in enumerate(NAMES)] * 10
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "named.parquet")
    return tmp_path / "named.parquet"


WAYS = {"all": [], "lora": ["--lora_r", "4"], "reversible": REVERSIBLE}


@pytest.mark.parametrize("way", WAYS)
def test_a_classifier_is_measured_by_its_own_classes(way, model, encoder, named, tmp_path, monkeypatch):
    base = encoder if way == "reversible" else model
    assert main(["train", *arguments(None, base, named, *LEARNING, *WAYS[way])]) == 0
    trained = ["--model", base, "--reversible_adapters", "out"] if way == "reversible" else ["--model", "out"]
    files = [
        named,
        rows_of(tmp_path / "names.jsonl", str),
        rows_of(tmp_path / "capitals.jsonl", str.upper),
        rows_of(tmp_path / "numbers.jsonl", NAMES.index),
        rows_of(tmp_path / "two.jsonl", str, NAMES[1:]),
        rows_of(tmp_path / "one.jsonl", str, NAMES[2:]),
    ]
    for file in files:
        assert measured(*trained, "--dataset", file, "--max_length", "128")["accuracy"] == 1.0
    if way == "lora":
        assert main(["merge", "--model", "out", "--output_dir", "merged"]) == 0
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"] == dict(zip("012", NAMES))
        assert measured("--model", "merged", "--dataset", files[1])["accuracy"] == 1.0
    monkeypatch.setattr("hf_memtune.cli.data.rows.relabelled", lambda data, known, *parts: parts)
    assert measured(*trained, "--dataset", files[1], "--max_length", "128")["accuracy"] == 0.0  # each by the order of the letters


def test_training_goes_on_with_the_same_classes(model, named, tmp_path, capsys):
    assert main(["train", *arguments(None, model, named, *LEARNING)]) == 0
    names = rows_of(tmp_path / "names.jsonl", str)
    assert main(["train", *arguments(None, "out", names, "--learning_rate", "1e-9", "--output_dir", "more")]) == 0
    found = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert found["held_out_scores"]["accuracy"] == [1.0, 1.0]
    assert json.loads((tmp_path / "more" / "config.json").read_text())["id2label"] == dict(zip("012", NAMES))
    others = rows_of(tmp_path / "others.jsonl", {"positive": "fine", "negative": "negative", "neutral": "so so"}.get)
    capsys.readouterr()
    for command in (
        ["train", *arguments(None, "out", others, "--output_dir", "further")],
        ["evaluate", "--model", "out", "--dataset", str(others)],
    ):
        assert main(command) == 2
        shown = capsys.readouterr().err
        assert "'fine', 'so so'" in shown and "'positive', 'negative', 'neutral'" in shown
    out_of_range = rows_of(tmp_path / "shifted.jsonl", lambda name: NAMES.index(name) + 1)
    assert main(["evaluate", "--model", "out", "--dataset", str(out_of_range)]) == 2
    assert "has 3, which" in capsys.readouterr().err
    assert main(["train", *arguments(None, model, others, "--output_dir", "new")]) == 0  # which has no head: it learns them


def test_a_model_without_a_head_for_classes_is_not_measured_with_a_new_one(model, tmp_path, capsys):
    names = str(rows_of(tmp_path / "names.jsonl", str))
    assert main(["evaluate", "--model", str(model), "--dataset", names]) == 2
    assert "has no head for classes" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(model), "--dataset", names, "--task", "causal_lm"]) == 0
    assert main(["train", *arguments(None, model, names, "--task", "causal_lm", "--lora_r", "2")]) == 0
    assert main(["evaluate", "--model", "out", "--dataset", names]) == 2


def numbers(labels, known, names=None):
    """The numbers that the rows get; None where they are left as they are."""
    data = DataSource(task=CLASSES)
    value = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, Features({"text": Value("string"), "label": value}))
    (made,) = relabelled(data, known, rows)
    if made is rows:
        return None
    assert made.features["label"].names == known
    return made["label"][:]


LABELS = ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    "labels, known, names, expected",
    [
        (["b", "a"], ["b", "a"], None, [0, 1]),
        ([0, 1, 0], ["b", "a"], None, [0, 1, 0]),
        ([0, 1], ["b", "a"], ["a", "b"], [1, 0]),
        ([2, 0], LABELS, None, [2, 0]),
        (["LABEL_2", "LABEL_0"], LABELS, None, [2, 0]),
        (["z", "x", "y"], LABELS, None, None),
        ([0, 1], LABELS, ["x", "y", "z"], None),
        ([3, 1], ["1", "2", "3"], None, [2, 0]),
        (["1"], ["0", "1"], None, [1]),
        (["b", "a"], None, None, None),
    ],
)
def test_labels_are_numbers_of_the_model(labels, known, names, expected):
    assert numbers(labels, known, names) == expected


@pytest.mark.parametrize(
    "labels, known, names, told",
    [
        (["b", "c"], ["b", "a"], None, "has 'c', which the model does not know; its classes are 'b', 'a'"),
        ([0, 2, -1], ["b", "a"], None, "has -1, 2, which"),
        ([0, -1], ["b", "a"], ["a", "b"], "has -1, which"),
        ([3], LABELS, None, "has 3, which"),
        (["x", "y"], LABELS, None, "got 2 class(es), 'x', 'y', but the model tells 3 apart, which have no names"),
        ([0, 1], LABELS, ["x", "y"], "got 2 class(es)"),
        ([0], ["1", "2", "3"], None, "has 0, which"),
        (["a"], ["A", "a ", "a\t"], None, None),
        (["é", "x"], ["A", "a"], None, "has 'x', 'é'"),
    ],
)
def test_labels_that_the_model_does_not_know(labels, known, names, told):
    if told is None:  # in other letters it is one of them
        assert numbers(labels, known, names) == [0]
        return
    with pytest.raises(ConfigError) as raised:
        numbers(labels, known, names)
    assert len(raised.value.problems) == 1 and told in raised.value.problems[0]


def test_names_of_another_head_are_not_taken(model, named, tmp_path):
    assert main(["train", *arguments(None, model, named, "--lora_r", "2", "--save_strategy", "steps", "--save_steps", "2")]) == 0
    for folder in ("out", "out/checkpoint-2"):
        assert known_classes(ModelSource(model_name_or_path=folder)) == NAMES
    (tmp_path / "out" / "labels.json").write_text('["a", "b"]')
    assert known_classes(ModelSource(model_name_or_path="out")) == LABELS
    assert known_classes(ModelSource(model_name_or_path=str(model))) is None
