"""The tasks of GLUE (Wang et al. 2019, arXiv 1804.07461) as data, with the columns that they have on the hub as nyu-mll/glue.

WNLI is left out, as in BERT and MEFT: its validation rows contradict those to train on.
"""

from dataclasses import dataclass

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """What a row is, and what is measured.

    sentences: columns of one text or of two. labels: names of the classes in the order of their numbers; empty: the label is a number
    to predict (regression); None: found in the rows. metrics: names that load_metric knows. validation: splits on the hub.
    """

    sentences: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        return self.labels == ()


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": GlueTask(_PAIR, (), ("pearsonr", "spearmanr")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validation=("validation_matched", "validation_mismatched")
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment")),
}
CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
SCORE_METRICS = ("pearsonr", "spearmanr")
