"""The study of questions with choices, from end to end on a tiny model and rows of its own."""

import json

import pytest

from tests.support.folders import in_new_process, llama, write_rows
from tests.support.scripts import FOLDER

ARMS = ["plain", "streaming", "centred exact"]
# One process for all: importing takes longer than these runs.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import bench_learning
import lm_eval.evaluator
lm_eval.evaluator.add_env_info = lambda results: None  # it runs pip, which takes a second
common = ["qa", "--assets", {assets!r}, "--out", "qa.jsonl", "--steps", "3", "--held_out_rows", "12"]
statuses = {{
    "unknown": bench_learning.main(["qa", "--stage", "tune", "--arms", "meft9", "--list"]),
    "tune": bench_learning.main([*common, "--stage", "tune", "--learning_rates", "0.01", "--tasks", "boolq", "--arms", "plain", "centred exact"]),
    "final": bench_learning.main([*common, "--stage", "final", "--seeds", "1", "2", "--tasks", "boolq", "--arms", *{arms!r}]),
    "other": bench_learning.main(
        [*common, "--stage", "final", "--learning_rates", "0.01", "--seeds", "1", "--tasks", "mmlu", "--arms", "plain"]
    ),
}}
Path("statuses.json").write_text(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qa")
    for name in ("models", "data/boolq", "data/mmlu"):
        (made / name).mkdir(parents=True)
    llama(made / "models" / "smollm2-135m-instruct")
    boolq = [
        {"question": f"is the {word} red", "passage": f"the {word} is red", "answer": n % 3 > 0}
        for n, word in enumerate(["sun", "sea"] * 20)
    ]
    mmlu = [{"question": "name a colour", "subject": "art", "choices": ["sea", "red", "sun", "film"], "answer": 1} for _ in range(40)]
    long = {"question": "what", "passage": "sea " * 400, "answer": True}
    write_rows(made / "data" / "boolq" / "validation.jsonl", [*boolq, long])
    write_rows(made / "data" / "mmlu" / "test.jsonl", mmlu)
    done = in_new_process("-c", PROGRAM.format(scripts=str(FOLDER), assets=str(made), arms=ARMS), cwd=made)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def finals(folder):
    rows = map(json.loads, (folder / "qa.jsonl").read_text().splitlines())
    return {(row["task"], row["arm"], row["seed"]): row for row in rows if row["stage"] == "final"}


def test_every_run_ends(folder, finals):
    assert json.loads((folder / "statuses.json").read_text()) == {"unknown": 2, "tune": 0, "final": 0, "other": 0}
    assert set(finals) == {("mmlu", "plain", 1), *(("boolq", arm, seed) for arm in ARMS for seed in (1, 2))}


def test_streaming_learns_and_scores_as_plain_training_does(finals):
    for seed in (1, 2):
        plain, streamed, adapters = (finals["boolq", arm, seed] for arm in ARMS)
        assert [loss for _, loss in streamed["losses"]] == pytest.approx([loss for _, loss in plain["losses"]], rel=1e-4)
        assert streamed["accuracies"] == plain["accuracies"] and streamed["learning_rate"] == plain["learning_rate"] == 0.01
        assert adapters["losses"][1][1] != pytest.approx(plain["losses"][1][1], rel=1e-4)  # the sibling
        assert adapters["trainable_parameters"] < plain["trainable_parameters"] == plain["parameters"]


def test_a_score_has_its_standard_error_and_what_the_commonest_answer_would_get(finals):
    """What was before training, one seed measures."""
    for (task, _, seed), row in finals.items():
        (_, before), (_, after) = row["accuracies"]
        assert (
            0 <= after <= 1
            and row["standard_error"] == pytest.approx((after * (1 - after) / 11) ** 0.5)
            and (before is None) == (seed == 2)
        )
        share = row["conditions"]["data"].partition("right in ")[2].partition("%")[0]
        assert int(share) == 100 if task == "mmlu" else 50 <= int(share) < 100
        assert (
            row["conditions"]["rows_to_train_on"] == {"boolq": 16, "mmlu": 16}[task]
        )  # 40, less two parts of 12; the long one is left out
