"""Spearman correlation: how alike predictions and true values are in order, from -1 to 1."""

import datasets
import evaluate
from scipy.stats import spearmanr  # which scikit-learn requires

# evaluate.load copies this file out of the package before importing it: it must stand alone, so no hf_memtune here.

_DESCRIPTION = "The correlation of the ranks of predicted and true values, from -1 to 1; not a number where either is constant."

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): predicted values, shape (n,).
    references (list of float): true values, shape (n,).
Returns:
    dict with `spearmanr` (float).
"""

_CITATION = "scipy.stats.spearmanr, https://docs.scipy.org/doc/scipy/reference/stats.html"


class Spearmanr(evaluate.Metric):
    def _info(self):
        values = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(values),
        )

    def _compute(self, predictions, references):
        return {"spearmanr": float(spearmanr(references, predictions).statistic)}
