"""`hf-memtune qa`: five tasks on made-up rows in their columns, trained as they are scored; and what is refused."""

import json
import math
import runpy
import sys

import datasets
import pytest
import yaml

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_memtune.cli import main, qa  # noqa: E402
from hf_memtune.cli.data import IGNORED  # noqa: E402
from hf_memtune.cli.qa_arguments import QaArguments  # noqa: E402
from hf_memtune.cli.qa_data import NOTHING, answered, prepare  # noqa: E402
from hf_memtune.cli.qa_tasks import TASKS  # noqa: E402
from hf_memtune.errors import ConfigError  # noqa: E402
from tests.support.folders import ROOT, tokenizer, write_rows  # noqa: E402
from tests.support.questions import question_files, questions  # noqa: E402

RECIPES = sorted((ROOT / "configs" / "qa").glob("*.yaml"))
QUIET = "--use_cpu --disable_tqdm true --report_to none".split()
LEARN = [*QUIET, "--learning_rate", "1e-2", "--num_train_epochs", "8"]


@pytest.fixture(autouse=True)
def no_description_of_the_machine(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip, which takes a second


def summary(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def problems(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        qa.make_trainer(qa.parse(arguments))
    return caught.value.problems


# --- the tasks


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_trains(recipe, model, tmp_path, capsys):
    """Its task, its settings, a tiny model: adapters are saved, and what lm-eval says of them before and after."""
    files = question_files(tmp_path, recipe.stem, 8)
    few = ["--max_steps", "2", "--reversible_layers", "2", "--max_eval_rows", "12"]
    assert main(["qa", str(recipe), "--model", str(model), *files, *QUIET, *few]) == 0
    numbers, written = summary(tmp_path), json.loads((tmp_path / "out" / "scores.json").read_text())
    assert numbers["held_out_scores"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert numbers["held_out_scores"]["acc"][1] == written["results"][recipe.stem]["acc,none"]
    assert written["n-samples"][recipe.stem] == {"original": 40, "effective": 12}
    before, after = numbers["held_out_loss"]
    assert math.isfinite(after) and before != after and numbers["trainable_parameters"] < numbers["parameters"] / 2
    assert (tmp_path / "out" / "reversible_adapters.safetensors").exists() and (tmp_path / "out" / "scores.png").exists()
    assert f"|{recipe.stem}" in capsys.readouterr().out


def test_there_is_a_recipe_for_every_task_within_the_paper():
    assert {recipe.stem for recipe in RECIPES} == set(TASKS)
    for recipe in RECIPES:
        settings = yaml.safe_load(recipe.read_text())
        assert settings["task_name"] == recipe.stem and settings["reversible"] == "meft1" and settings["adapter_rank"] == 64
        assert 1e-4 <= float(settings["learning_rate"]) <= 7e-4 and 3 <= settings["num_train_epochs"] <= 10


WAYS = {
    "all parameters": [], "lora": ["--lora_r", "8"],
    "reversible adapters": ["--reversible", "meft1", "--adapter_rank", "16"],
}  # fmt: skip


@pytest.mark.parametrize("way, shuffled", [*((way, False) for way in WAYS), ("all parameters", True)])
def test_what_can_be_learned_is_learned(way, shuffled, model, tmp_path, monkeypatch):
    """By the script, from files. Answers that were dealt out anew among the questions to train on teach none of those that are scored."""
    files = question_files(tmp_path, "openbookqa", shuffled=shuffled)
    command = ["train_qa.py", "--task_name", "openbookqa", "--model", str(model), *files, *LEARN, *WAYS[way]]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "train_qa.py"), run_name="__main__")
    assert ended.value.code == 0
    before, after = summary(tmp_path)["held_out_scores"]["acc"]
    assert before < 0.6 and (after < 0.6 if shuffled else after > 0.85)  # one of four is right by chance, with a standard error of 0.07


# --- rows


@pytest.mark.parametrize("name", TASKS)
def test_what_is_trained_is_what_is_scored(name, model, tmp_path, monkeypatch):
    """The tokens of a row, and which of them are the answer, are those whose probability lm-eval takes for the right choice."""
    files, words = question_files(tmp_path, name, 6), tokenizer()
    rows = prepare(QaArguments(name, train_file=files[1], test_file=files[3], max_eval_rows=6), words)
    seen = []

    def tokens(self, requests, **kwargs):
        seen.extend(requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", tokens)
    from hf_memtune.evaluation.harness import score

    score(AutoModelForCausalLM.from_pretrained(model), words, rows.tasks, limit=6)
    scored = [(context + answer, [IGNORED] * len(context) + answer) for _, context, answer in seen]
    trained = [(row["input_ids"], row["labels"]) for row in rows.held_out]
    choices = len(scored) // len(trained)
    picked = [group.index(row) for group, row in zip(zip(*[iter(scored)] * choices), trained)]
    tasks = rows.tasks.found["tasks"][name]
    assert len(trained) == 6 and picked == [tasks.doc_to_target(doc) for doc in tasks.eval_docs.select(range(6))]
    assert all(text.startswith(" ") for (_, text), _, _ in seen)


def test_an_answer_begins_with_its_space(model):
    """A tokenizer that knows spaces, as most do: the answer trained is the one with a space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<pad>", *pre_tokenizers.ByteLevel.alphabet()])}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")

    def labelled(row) -> str:
        return words.decode([token for token in row["labels"] if token != IGNORED])

    assert labelled(answered("Why? ", " red", words, 64)) == "  red" and labelled(answered("Why?", " red", words, 64)) == " red"
    row = answered("A long text.\nWhy?", " red", words, 9)
    assert words.decode(row["input_ids"]) == "\nWhy? red" and labelled(row) == " red"
    assert labelled(answered("Why?", " scarlet", words, 4)) == "rlet"
    plain = answered("Why?", " red", words, 64)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", 0)])
    # the end of a text is no part of the answer
    assert words("Why?")["input_ids"][-1] == 0 and answered("Why?", " red", words, 64) == plain


def test_files_are_read_as_they_are_written(tmp_path):
    """007 is no 7, and 12 beside 0.50 no 12.0; a column that is not of the task may stand in one of the files alone."""
    (tmp_path / "train.csv").write_text("goal,sol1,sol2,label,source\nadd one,007,0.50,1,a\nadd two,12,True,0,b\n")
    (tmp_path / "test.csv").write_text("goal,sol1,sol2,label\nname two,1,2.5,0\nname one,None,3,1\n")
    rows = prepare(QaArguments("piqa", train_file=str(tmp_path / "train.csv"), test_file=str(tmp_path / "test.csv")), tokenizer())
    task = rows.tasks.found["tasks"]["piqa"]
    trained, scored = (
        [(task.doc_to_choice(doc), task.doc_to_target(doc)) for doc in docs] for docs in (task.training_docs(), task.eval_docs)
    )
    assert trained == [(["007", "0.50"], 1), (["12", "True"], 0)] and scored == [(["1", "2.5"], 0), (["None", "3"], 1)]
    assert len(rows.train) == len(rows.held_out) == 2


def test_rows_of_the_hub(monkeypatch):
    """Asked for by lm-eval's names; of PIQA the validation rows are scored, and of others another split may be."""
    asked = []

    def load_dataset(path, name=None, **kwargs):
        asked.append((path, name))
        kind = "piqa" if "piqa" in path else "openbookqa"
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(questions(kind, count)) for split, count in (("train", 9), ("validation", 5), ("test", 7))}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = prepare(QaArguments("piqa", max_train_rows=4), tokenizer())
    assert (len(rows.train), len(rows.held_out)) == (4, 5) and asked[-1] == ("baber/piqa", None)
    assert len(prepare(QaArguments("openbookqa"), tokenizer()).held_out) == 7 and asked[-1] == ("allenai/openbookqa", "main")
    assert len(prepare(QaArguments("openbookqa", scored_split="validation"), tokenizer()).held_out) == 5


# --- refusals

NO_MODEL = ["--model", "m", "--use_cpu", "true"]


def test_problems_of_the_settings_come_all_at_once(tmp_path):
    found = problems(["--task_name", "boolq", "--train_file", "absent.jsonl", "--max_length", "1", "--max_eval_rows", "0", *NO_MODEL])
    assert [problem.split(":")[0] for problem in found] == ["task_name", "test_file", "train_file", "max_length", "max_eval_rows"]
    files = question_files(tmp_path, "piqa", 4)
    (message,) = problems(["--task_name", "piqa", *files, "--scored_split", "validation", *NO_MODEL])
    assert message.startswith("scored_split has no effect with test_file")
    (tmp_path / "test.csv").write_text("goal\n")
    (message,) = problems(["--task_name", "piqa", *files[:2], "--test_file", str(tmp_path / "test.csv"), *NO_MODEL])
    assert "files of one kind" in message


def test_files_that_are_not_of_the_task(model, tmp_path):
    of_sciq = question_files(tmp_path, "sciq", 4)
    found = problems(["--task_name", "piqa", *of_sciq, "--model", str(model), "--use_cpu"])
    assert [problem.split(":")[0] for problem in found] == ["train_file", "test_file"] and "no column goal, sol1, sol2, label" in found[0]
    wrong = [row | {"answerKey": "E"} for row in questions("arc_easy", 4)]
    files = [
        "--train_file",
        str(write_rows(tmp_path / "bad.jsonl", wrong)),
        "--test_file",
        str(write_rows(tmp_path / "good.jsonl", questions("arc_easy", 4))),
    ]
    (message,) = problems(["--task_name", "arc_easy", *files, "--model", str(model), "--use_cpu"])
    assert "row 0 of the rows to train on has no right answer" in message


def test_rows_without_an_answer_do_not_have_the_last_one(model, tmp_path):
    """-1, as test rows of PIQA have it on the hub."""
    unlabelled = write_rows(tmp_path / "bad.jsonl", [row | {"label": -1} for row in questions("piqa", 4)])
    files = ["--train_file", str(unlabelled), "--test_file", str(write_rows(tmp_path / "good.jsonl", questions("piqa", 4)))]
    (message,) = problems(["--task_name", "piqa", *files, "--model", str(model), "--use_cpu"])
    assert "row 0 of the rows to train on has no right answer" in message


def test_answers_that_are_missing(model, tmp_path):
    """null would be learned as a word; an empty answer has nothing to learn, and is counted."""
    good, (first, *others) = write_rows(tmp_path / "good.jsonl", questions("sciq", 4)), questions("sciq", 4)
    for name, answer in (("null", None), ("empty", "")):
        write_rows(tmp_path / f"{name}.jsonl", [first | {"correct_answer": answer}, *others])
    with pytest.raises(ConfigError, match="row 0 of the rows to train on has no correct_answer .null."):
        prepare(QaArguments("sciq", train_file=str(tmp_path / "null.jsonl"), test_file=str(good)), tokenizer())
    rows = prepare(QaArguments("sciq", train_file=str(tmp_path / "empty.jsonl"), test_file=str(good)), tokenizer())
    assert len(rows.train) == 3 and rows.reasons == {NOTHING: 1}


def test_without_the_hub_the_files_are_named(model):
    (message,) = problems(["--task_name", "sciq", "--model", str(model), "--use_cpu"])
    assert message.startswith("task_name: sciq") and "--train_file" in message and "tasks_folder" not in message
