"""F1: the harmonic mean of precision and recall."""

import datasets
import evaluate
from sklearn.metrics import f1_score

# evaluate.load copies this file out of the package before importing it: it must stand alone, so no hf_memtune here.

_DESCRIPTION = "The harmonic mean of precision and recall, 2 * precision * recall / (precision + recall)."

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted labels, shape (n,).
    references (list of int): true labels, shape (n,).
    labels (list of int): the classes to score, and their order with average=None. Default: all that occur.
    pos_label (int): the positive class with average="binary".
    average (str or None): "binary", "micro", "macro", "weighted", or None for one score a class.
    sample_weight (list of float): a weight for each sample, shape (n,).
Returns:
    dict with `f1`: a float, or a list of floats with average=None.
"""

_CITATION = "sklearn.metrics.f1_score, https://scikit-learn.org/stable/modules/model_evaluation.html"


class F1(evaluate.Metric):
    def _info(self):
        labels = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(labels),
        )

    def _compute(self, predictions, references, labels=None, pos_label=1, average="binary", sample_weight=None):
        score = f1_score(references, predictions, labels=labels, pos_label=pos_label, average=average, sample_weight=sample_weight)
        return {"f1": score.tolist() if average is None else float(score)}
