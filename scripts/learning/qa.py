"""One run of the study `qa`: questions with choices, learned and scored by `hf-memtune qa`, from rows that install without the hub.

The rows of BoolQ are written in the columns of piqa (two choices), those of MMLU in the columns of arc_easy: prompts are lm-eval's of those tasks.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from learning.arms import QA
from learning.commands import CommandBench, in_parts
from learning.plans import Run
from learning.tasks import require

MODEL, MAX_LENGTH = "models/smollm2-135m-instruct", 192
MOST_CHARACTERS = 500  # of a row, so that none is cut and a run ends within minutes
HELD_OUT = {"tuning": 64, "test": 400}
ALWAYS = f"--per_device_eval_batch_size 8 --max_length {MAX_LENGTH}".split()
LETTERS = "ABCD"


def of_boolq(row: dict) -> dict:
    return {"goal": f"{row['passage']}\n{row['question']}?", "sol1": "no", "sol2": "yes", "label": int(row["answer"])}


def of_mmlu(row: dict) -> dict:
    return {
        "question": row["question"],
        "choices": {"text": list(row["choices"]), "label": [*LETTERS]},
        "answerKey": LETTERS[row["answer"]],
    }


class Source(NamedTuple):
    """task_name: of `hf-memtune qa`. row_of: a row in the columns of that task. answer: the column that says which choice is right."""

    task_name: str
    data: str
    row_of: Callable[[dict], dict]
    answer: str


SOURCES = {
    "boolq": Source("piqa", "data/boolq/validation.jsonl", of_boolq, "label"),
    "mmlu": Source("arc_easy", "data/mmlu/test.jsonl", of_mmlu, "answerKey"),
}


class Bench(CommandBench):
    """What the runs share: the rows of a task, which stay written. Stages go through tasks in order."""

    score = "acc"

    def __init__(self, options):
        super().__init__(options)
        self.task, self.files, self.commonest = "", {}, 0.0

    def command(self):
        from hf_memtune.cli import qa

        return qa

    def train(self, run: Run) -> dict:
        if run.task != self.task:
            self._write(run.task)
        return super().train(run)

    def _write(self, task: str) -> None:
        import datasets

        source, assets = SOURCES[task], self.options.assets
        require(assets, MODEL, source.data, f"smollm2 {task}")
        found = datasets.load_dataset("json", data_files=str(assets / source.data), split="train")
        rows = datasets.Dataset.from_list([made for row in found if size_of(made := source.row_of(row)) <= MOST_CHARACTERS])
        self.task, self.folder = task, tempfile.TemporaryDirectory()
        self.files = in_parts(rows, HELD_OUT, self.options.held_out_rows, size_of, Path(self.folder.name))
        answers = datasets.load_dataset("parquet", data_files=str(self.files["test"]), split="train")[source.answer]
        self.commonest = Counter(answers).most_common(1)[0][1] / len(answers)

    def arguments(self, run: Run) -> dict:
        files = {"train_file": self.files["train"], "test_file": self.files[run.held_out]}
        return {"model": self.options.assets / MODEL, "task_name": SOURCES[run.task].task_name, **files}

    def flags(self, run: Run) -> tuple[str, ...]:
        return (*ALWAYS, *QA[run.arm])

    def described(self, run: Run) -> dict[str, str]:
        source = SOURCES[run.task]
        data = f"{source.data.removeprefix('data/')} in the columns of {source.task_name}, rows of {MOST_CHARACTERS} characters at most"
        commonest = f"the commonest answer is right in {self.commonest:.0%} of the scored rows"
        return {"model": f"{Path(MODEL).name}, float32", "data": f"{data}; {commonest}"}

    def measure(self, run: Run, rows):
        """Of the finals the score, too; before training that of one seed, for it takes as long as training: others have other random adapters."""
        from hf_memtune.cli import qa
        from hf_memtune.cli.train import held_out

        def measured(trainer) -> dict:
            scored = run.stage != "tune" and (run.seed == 1 or trainer.state.global_step > 0)
            return qa.held_out(trainer, rows, []) if scored else held_out(trainer)

        return measured


def size_of(row: dict) -> int:
    """Characters of the question and of all its choices."""
    return len(str(row))
