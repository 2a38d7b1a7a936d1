"""Accuracy: the share of predictions that equal their reference."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

# evaluate.load copies this file out of the package before importing it: it must stand alone, so no hf_memtune here.

_DESCRIPTION = "The share of predictions that equal their reference, between 0 and 1 (a count with normalize=False)."

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted labels, shape (n,).
    references (list of int): true labels, shape (n,).
    normalize (bool): the share of correct predictions if True, else their number.
    sample_weight (list of float): a weight for each sample, shape (n,).
Returns:
    dict with `accuracy` (float).
"""

_CITATION = "sklearn.metrics.accuracy_score, https://scikit-learn.org/stable/modules/model_evaluation.html"


class Accuracy(evaluate.Metric):
    def _info(self):
        labels = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(labels),
        )

    def _compute(self, predictions, references, normalize=True, sample_weight=None):
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}
