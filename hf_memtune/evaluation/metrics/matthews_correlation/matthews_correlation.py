"""Matthews correlation: of predicted and true classes, from -1 to 1; 0 is chance."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef

# evaluate.load copies this file out of the package before importing it: it must stand alone, so no hf_memtune here.

_DESCRIPTION = "The correlation of predicted and true classes, from -1 to 1; 0 is chance, also where one class alone is predicted."

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): predicted labels, shape (n,).
    references (list of int): true labels, shape (n,).
    sample_weight (list of float): a weight for each sample, shape (n,).
Returns:
    dict with `matthews_correlation` (float).
"""

_CITATION = "sklearn.metrics.matthews_corrcoef, https://scikit-learn.org/stable/modules/model_evaluation.html"


class MatthewsCorrelation(evaluate.Metric):
    def _info(self):
        labels = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(labels),
        )

    def _compute(self, predictions, references, sample_weight=None):
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions, sample_weight=sample_weight))}
