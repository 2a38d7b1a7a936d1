"""Five question-answering tasks, as MEFT (arXiv 2306.00477) trains them: what of lm-eval's task files is ours to know.

Prompts, choices and right answers come from lm-eval's own task files, so that what is trained is what is scored.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class QaTask:
    """folder: of lm-eval's task file, among its tasks. columns: what the rows on the hub have, and files have to have."""

    folder: str
    columns: tuple[str, ...]


_ARC = QaTask("arc", ("question", "choices", "answerKey"))
TASKS = {
    "openbookqa": QaTask("openbookqa", ("question_stem", "choices", "answerKey")),
    "piqa": QaTask("piqa", ("goal", "sol1", "sol2", "label")),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "sciq": QaTask("sciq", ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer")),
}
