"""`hf-memtune glue`: every task of GLUE on made-up rows in its columns, files of every kind, and what is refused."""

import json
import math

import datasets
import numpy
import pytest
import transformers
import yaml
from transformers import EvalPrediction

from hf_memtune.cli import glue, main
from hf_memtune.cli.arguments import ModelSource
from hf_memtune.cli.glue_arguments import GlueArguments
from hf_memtune.cli.glue_data import prepare
from hf_memtune.cli.glue_tasks import HUB_NAME, TASKS
from hf_memtune.errors import ConfigError
from tests.support.folders import ROOT, tokenizer, write_rows

SHORT = "--max_steps 2 --per_device_train_batch_size 4 --use_cpu --disable_tqdm true --max_length 32".split()
RECIPES = sorted((ROOT / "configs" / "glue").glob("*.yaml"))
TEXTS = ["a good film is the sun", "a bad poem", "write about the blue sea", "name one two colours"]


def label_of(name: str, n: int, stored: str = "number"):
    task = TASKS[name]
    if task.is_regression:
        return n % 6 * 0.8
    return n % len(task.labels) if stored == "number" else task.labels[n % len(task.labels)]


def glue_rows(name: str, count: int, stored: str = "number") -> list[dict]:
    """In the columns of the hub, `idx` too. The label is told by the first text."""
    sentences = TASKS[name].sentences
    return [{c: TEXTS[(n + k) % 3] for k, c in enumerate(sentences)} | {"label": label_of(name, n, stored), "idx": n} for n in range(count)]


def files_of(folder, name: str, stored: str = "number") -> list[str]:
    """The flags of local files, with every held-out set of the task."""
    train = write_rows(folder / "train.jsonl", glue_rows(name, 24, stored))
    held_out = [write_rows(folder / f"{split}.jsonl", glue_rows(name, 12, stored)) for split in TASKS[name].validation]
    return ["--train_file", str(train), "--validation_file", *map(str, held_out)]


def summary(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def problems(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        glue.make_trainer(glue.parse(arguments))
    return caught.value.problems


# --- the tasks

SCORES = {
    "cola": {"matthews_correlation"}, "sst2": {"accuracy"}, "mrpc": {"accuracy", "f1", "combined_score"},
    "stsb": {"pearsonr", "spearmanr", "combined_score"}, "qqp": {"accuracy", "f1", "combined_score"},
    "mnli": {"accuracy", "validation_mismatched_accuracy"}, "qnli": {"accuracy"}, "rte": {"accuracy"},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_trains(recipe, encoder, tmp_path, capsys):
    """Its task, its settings, a tiny model: what is saved is the adapters and the head."""
    files = files_of(tmp_path, recipe.stem)
    assert main(["glue", str(recipe), "--model", str(encoder), *files, *SHORT]) == 0
    assert "Training finished" in capsys.readouterr().out
    numbers = summary(tmp_path)
    assert numbers["held_out_scores"].keys() == SCORES[recipe.stem]
    assert all(-1 <= value <= 1 for pair in numbers["held_out_scores"].values() for value in pair)
    before, after = numbers["held_out_loss"]
    assert math.isfinite(after) and before != after and numbers["trainable_parameters"] < numbers["parameters"] / 2
    assert (tmp_path / "out" / "reversible_adapters.safetensors").exists() and not (tmp_path / "out" / "model.safetensors").exists()


def test_there_is_a_recipe_for_every_task_that_says_what_it_is_for():
    assert {recipe.stem for recipe in RECIPES} == set(TASKS)
    for recipe in RECIPES:
        assert recipe.read_text().startswith("# ") and yaml.safe_load(recipe.read_text())["task_name"] == recipe.stem


@pytest.mark.parametrize("name", TASKS)
def test_names_of_classes_are_their_numbers(name, tmp_path):
    """Local rows may have either; a regression has values alone."""
    made = []
    for stored in ("number", "name"):
        files = files_of(tmp_path, name, stored)
        made.append(prepare(GlueArguments(name, train_file=files[1], validation_file=files[3:]), tokenizer()))
    first, second = made
    assert first.train["labels"][:6] == second.train["labels"][:6] == [label_of(name, n) for n in range(6)]
    assert first.classes == (list(TASKS[name].labels) or ["value"]) and len(first.held_outs) == len(TASKS[name].validation)


def test_rows_of_the_hub(encoder, monkeypatch, tmp_path):
    """Asked for by name, each split once; and `validation_` is no part of what a set is called."""
    asked = []

    def load_dataset(name, config=None, split=None, **kwargs):
        asked.append((name, config, split))
        rows = datasets.Dataset.from_list(glue_rows("mnli", 12))
        return rows.cast_column("label", datasets.ClassLabel(names=list(TASKS["mnli"].labels)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = prepare(GlueArguments("mnli", max_eval_rows=5, max_train_rows=8), tokenizer())
    assert asked == [(HUB_NAME, "mnli", split) for split in ("train", "validation_matched", "validation_mismatched")]
    assert {name: len(part) for name, part in rows.held_outs.items()} == {"matched": 5, "mismatched": 5} and len(rows.train) == 8
    assert rows.train["labels"] == [n % 3 for n in range(8)]


def test_without_the_hub_the_files_are_named(encoder):
    (problem,) = problems(["--task_name", "rte", "--model", str(encoder), "--use_cpu"])
    assert problem.startswith("task_name") and "--train_file" in problem


def test_two_texts_are_joined_as_the_tokenizer_joins_them(tmp_path):
    words, files = tokenizer(), files_of(tmp_path, "qnli")
    rows = prepare(GlueArguments("qnli", train_file=files[1], validation_file=files[3:]), words)
    row = glue_rows("qnli", 1)[0]
    assert rows.train[0]["input_ids"] == words(row["question"], row["sentence"])["input_ids"] != words(row["question"])["input_ids"]
    short = prepare(GlueArguments("qnli", train_file=files[1], validation_file=files[3:], max_length=4), words)
    assert max(map(len, short.train["input_ids"])) == 4


# --- trained classifiers


def classifier(encoder, folder, names):
    """A folder of a model with a head for these classes."""
    labels = dict(enumerate(names))
    options = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    transformers.AutoModelForSequenceClassification.from_pretrained(encoder, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelSource(model_name_or_path=str(folder))


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["ENTAILMENT", "NOT_ENTAILMENT"]])
def test_a_classifier_of_the_same_classes_is_trained_further(names, encoder, tmp_path):
    model, files = classifier(encoder, tmp_path / "trained", names), files_of(tmp_path, "rte")
    settings = GlueArguments("rte", train_file=files[1], validation_file=files[3:])
    assert prepare(settings, tokenizer(), model).train["labels"] == prepare(settings, tokenizer()).train["labels"]


def test_a_classifier_of_other_classes_is_refused_with_what_helps(encoder, tmp_path):
    own = ["not_entailment", "entailment"]
    classifier(encoder, tmp_path / "trained", own)
    classifier(encoder, tmp_path / "three", ["LABEL_0", "LABEL_1", "LABEL_2"])
    classifier(encoder, tmp_path / "others", ["negative", "positive"])
    files = files_of(tmp_path, "rte", "name")
    run = ["--task_name", "rte", *files, *SHORT, "--model"]
    assert ["--sentence_column" in problem for name in ("trained", "three", "others") for problem in problems([*run, name])] == [
        True,
        False,
        False,
    ]
    glue.make_trainer(glue.parse([*run, str(encoder)]))
    columns = ["--sentence_column", "sentence1", "--second_sentence_column", "sentence2"]
    _, rows = glue.make_trainer(glue.parse([*files, *SHORT, "--model", "trained", *columns]))
    assert rows.classes == own and rows.train["labels"][:4] == [1, 0, 1, 0]
    _, rows = glue.make_trainer(glue.parse([*files, *SHORT, "--model", str(encoder), *columns]))
    assert rows.classes == own[::-1] and rows.train["labels"][:4] == [0, 1, 0, 1]


# --- scores


def scored(name: str, predictions, labels) -> dict:
    return glue.scores_of(TASKS[name], len(TASKS[name].labels) or 1)(EvalPrediction(predictions, labels))


def test_scores_of_classes():
    logits, labels = numpy.eye(2)[[0, 1, 1, 1]], numpy.array([0, 1, 1, 0])
    assert scored("mrpc", logits, labels) == pytest.approx({"accuracy": 0.75, "f1": 0.8, "combined_score": 0.775})
    assert scored("cola", logits, labels) == pytest.approx({"matthews_correlation": 1 / math.sqrt(3)})
    assert scored("mrpc", (logits, "hidden states"), labels) == scored("mrpc", logits, labels) != scored("mrpc", 1 - logits, labels)


def test_scores_of_values():
    values, labels = numpy.array([[1.0], [2.0], [4.0]]), numpy.array([1.0, 2.0, 3.0])
    pearson = 3 / math.sqrt(2 * 14 / 3)
    assert scored("stsb", values, labels) == pytest.approx({"pearsonr": pearson, "spearmanr": 1.0, "combined_score": (pearson + 1) / 2})
    assert scored("stsb", -values, labels)["spearmanr"] == pytest.approx(-1.0)


def test_f1_of_more_than_two_classes_is_their_mean(tmp_path):
    logits, labels = numpy.eye(3)[[0, 1, 2, 2]], numpy.array([0, 1, 2, 1])
    settings = GlueArguments(train_file="t.csv", metrics=["f1"])
    assert glue.scores_of(settings.resolved, 3)(EvalPrediction(logits, labels)) == pytest.approx({"f1": (1 + 2 / 3 + 2 / 3) / 3})


# --- files of one's own


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_files_of_every_kind(kind, tmp_path):
    rows = datasets.Dataset.from_list([{"text": TEXTS[n % 2], "class": ["good", "bad"][n % 2]} for n in range(8)])
    write = {"csv": rows.to_csv, "json": rows.to_json, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind]
    files = [str(tmp_path / f"{name}.{kind}") for name in ("train", "dev")]
    for file in files:
        write(file)
    made = prepare(GlueArguments(train_file=files[0], validation_file=files[1:], sentence_column="text", label_column="class"), tokenizer())
    assert made.classes == ["bad", "good"] and made.train["labels"] == [1, 0] * 4 and made.held_outs.keys() == {"dev"}


NO_MODEL = ["--model", "m", "--use_cpu", "true"]
REVERSIBLE = ["--reversible", "meft1", "--adapter_rank", "4", "--adapter_init_std", "0.2", "--train_head", "true"]


@pytest.mark.parametrize("numerics", ["exact", "float"])
@pytest.mark.filterwarnings("ignore:reversible_numerics=float")
def test_a_reversible_run_is_saved_and_goes_on(numerics, encoder, reviews, tmp_path):
    """The adapters and the head that were written give the scores they had; what is trained further differs."""
    run = ["glue", "--model", str(encoder), "--train_file", str(reviews), "--validation_file", str(reviews), "--sentence_column", "text"]
    assert main([*run, *SHORT, *REVERSIBLE, "--reversible_numerics", numerics]) == 0
    ended = summary(tmp_path)
    assert main([*run, *SHORT, "--reversible_adapters", "out", "--output_dir", "more"]) == 0
    more = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert more["held_out_loss"][0] == ended["held_out_loss"][1] != more["held_out_loss"][1]


@pytest.mark.parametrize("flags, trains_all", [([], True), (["--lora_r", "2"], False), (["--reversible", "centred"], False)])
def test_a_regression_on_columns_of_ones_own(flags, trains_all, encoder, tmp_path):
    rows = [{"a": TEXTS[n % 4], "b": TEXTS[n % 3], "near": n % 3 + 0.5} for n in range(16)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    columns = "--sentence_column a --second_sentence_column b --label_column near --regression --metrics spearmanr".split()
    run = ["glue", "--model", str(encoder), "--train_file", str(file), "--validation_file", str(file), *columns, *SHORT, *flags]
    assert main(run) == 0
    numbers = summary(tmp_path)
    assert numbers["held_out_scores"].keys() == {"spearmanr"} and math.isfinite(numbers["held_out_loss"][1])
    assert (numbers["trainable_parameters"] == numbers["parameters"]) == trains_all


# --- refusals


def test_problems_of_the_settings_come_all_at_once(tmp_path):
    flags = ["--train_file", "absent.csv", "--max_length", "1", "--metrics", "pearsonr", "--max_eval_rows", "0", *NO_MODEL]
    found = [problem.split(":")[0] for problem in problems(flags)]
    assert found == ["validation_file", "train_file", "max_length", "max_eval_rows", "metrics"]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--task_name", "wnli"], "task_name"),
        ([], "task_name"),
        (["--task_name", "rte", "--validation_file", "dev.txt"], "train_file"),
        (["--validation_file", "a/dev.csv", "b/dev.csv", "--train_file", "t.csv"], "several files called 'dev'"),
    ],
)
def test_settings_that_cannot_work(flags, named):
    assert named in " ".join(problems([*flags, *NO_MODEL]))


def test_what_a_task_has_by_itself_is_said(tmp_path):
    (problem,) = problems(["--task_name", "sst2", "--metrics", "f1", *NO_MODEL])
    assert problem.startswith("metrics has no effect with task_name=sst2")


def bad_rows(tmp_path, rows: list[dict], *flags: str) -> list[str]:
    good = write_rows(tmp_path / "good.jsonl", [{"sentence": TEXTS[n % 2], "label": n % 2} for n in range(4)])
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        files = ["--train_file", str(good), "--validation_file", str(bad)]
        prepare(glue.parse([*files, *flags, *NO_MODEL]).data, tokenizer())
    return caught.value.problems


def test_columns_that_are_missing_are_all_named(tmp_path):
    found = bad_rows(tmp_path, [{"text": "a", "class": 1}])
    assert [problem.split(":")[0] for problem in found] == ["sentence_column", "label_column"]
    assert all("bad has no column" in problem and "text, class" in problem for problem in found)
    (problem, *_) = bad_rows(tmp_path, [{"text": "a", "label": 1}], "--task_name", "sst2")
    assert problem.startswith("task_name=sst2: bad has no column 'sentence'")


def test_texts_that_are_missing_are_refused_and_others_read_as_they_are(tmp_path):
    (problem,) = bad_rows(tmp_path, [{"sentence": "a", "label": 1}, {"sentence": None, "label": 0}])
    assert problem.startswith("sentence_column: bad has 1 rows without a 'sentence' (null)")
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"sentence": n, "label": n} for n in (0, 1)])
    rows = prepare(glue.parse(["--train_file", str(numbers), "--validation_file", str(numbers), *NO_MODEL]).data, tokenizer())
    assert rows.train["input_ids"][0] == tokenizer()("0")["input_ids"] != tokenizer()("")["input_ids"]


@pytest.mark.parametrize("label, flags", [(7, []), ("good", []), (-1, ["--task_name", "sst2"]), ("neutral", ["--task_name", "cola"])])
def test_labels_that_the_rows_to_train_on_lack(label, flags, tmp_path):
    (problem,) = bad_rows(tmp_path, [{"sentence": "a", "label": label}], *flags)
    assert problem.startswith(f"label_column: bad has {label!r}") and "expected one of: 0" in problem


@pytest.mark.parametrize("label", ["high", None])
def test_values_that_are_no_numbers(label, tmp_path):
    (problem,) = bad_rows(tmp_path, [{"sentence": "a", "label": label}], "--regression")
    assert problem.startswith(f"label_column: bad has {label!r}") and "expected numbers" in problem


def test_every_setting_has_a_help_text():
    assert not [action.dest for action in glue.make_parser()._actions if not action.help]
