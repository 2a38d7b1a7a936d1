"""Stand-ins for five question-answering data sets, in the columns that they have on the hub: a word of the question tells the answer."""

import json
import random
from pathlib import Path

from tests.support.folders import write_rows

ANSWERS = {"sun": "red", "sea": "blue", "film": "green", "poem": "three"}

TASK_FILE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def questions(name: str, count: int, seed: int = 0, shuffled: bool = False) -> list[dict]:
    """Rows of a task. shuffled: the answers are dealt out again among the questions, so that none tells its own."""
    draw = random.Random(seed)
    words = [draw.choice(list(ANSWERS)) for _ in range(count)]
    right = [ANSWERS[word] for word in words]
    if shuffled:
        draw.shuffle(right)
    return [_row(name, word, answer, draw) for word, answer in zip(words, right)]


def _row(name: str, word: str, right: str, draw: random.Random) -> dict:
    wrong = [answer for answer in ANSWERS.values() if answer != right]
    draw.shuffle(wrong)
    choices = [right, *wrong]
    draw.shuffle(choices)
    if name == "piqa":
        pair = [right, wrong[0]] if draw.random() < 0.5 else [wrong[0], right]
        return {"goal": f"about the {word}", "sol1": pair[0], "sol2": pair[1], "label": pair.index(right)}
    if name == "sciq":
        return {"support": "a short film", "question": f"the {word}", "correct_answer": right} | {
            f"distractor{number}": answer for number, answer in enumerate(wrong, 1)
        }
    question = "question_stem" if name == "openbookqa" else "question"
    letters = {"text": choices, "label": list("ABCD")}
    return {question: f"about the {word} ", "choices": letters, "answerKey": "ABCD"[choices.index(right)]}


def question_files(folder: Path, name: str, count: int = 64, shuffled: bool = False) -> list[str]:
    """Flags of files to train on and to score; what is scored is never shuffled."""
    train = write_rows(folder / "train.jsonl", questions(name, count, 0, shuffled))
    test = write_rows(folder / "test.jsonl", questions(name, 40, 1))
    return ["--train_file", str(train), "--test_file", str(test)]


def task_folder(folder: Path, *names: str, rows: list[dict] | None = None) -> Path:
    """Task files of one's own, all of the same rows, in piqa's columns and with its prompt."""
    folder.mkdir(exist_ok=True)
    file = write_rows(folder / "rows.jsonl", questions("piqa", 40, 1) if rows is None else rows)
    for name in names:
        (folder / f"{name}.yaml").write_text(TASK_FILE.format(name=name, rows=json.dumps(str(file))))
    return folder
