"""Metrics that load without the hub.

`evaluate.load("accuracy")` downloads a script; the modules under metrics/ have the same interface and are shipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf_memtune.errors import MemTuneError

if TYPE_CHECKING:
    import evaluate

__all__ = ["UnknownMetricError", "available_metrics", "load_metric"]

_METRICS = Path(__file__).parent / "metrics"


class UnknownMetricError(MemTuneError, ValueError):
    """The package carries no metric of this name."""


def available_metrics() -> list[str]:
    """The names that `load_metric` accepts, sorted."""
    return sorted(folder.name for folder in _METRICS.iterdir() if _script(folder.name).is_file())


def load_metric(name: str) -> evaluate.EvaluationModule:
    """The metric `name`, read from the package; no network is touched.

    It is what `evaluate.load` returns: `load_metric("f1").compute(predictions=p, references=r, average="macro")` takes
    integer labels of shape (n,) and returns a dict keyed by the metric's name.

    Raises:
        UnknownMetricError: no metric of this name is shipped.
    """
    if name not in available_metrics():
        raise UnknownMetricError(
            f"no metric named {name!r}; available: {', '.join(available_metrics())}. "
            "For any other, evaluate.load takes the path of a metric script."
        )
    import evaluate  # here, because it takes seconds and most users of this package load no metric

    return evaluate.load(str(_script(name)))


def _script(name: str) -> Path:
    return _METRICS / name / f"{name}.py"
