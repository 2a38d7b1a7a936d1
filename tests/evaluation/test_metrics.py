"""The shipped metrics: their values are scikit-learn's, and loading them touches no network."""

import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import hf_memtune.evaluation
from hf_memtune.errors import MemTuneError
from hf_memtune.evaluation import available_metrics, load_metric

REFERENCES = [0, 1, 2, 0, 1, 2, 1]
PREDICTIONS = [0, 2, 1, 0, 0, 2, 1]
BINARY_REFERENCES = [0, 1, 0, 1, 1, 0]
BINARY_PREDICTIONS = [0, 1, 1, 0, 1, 0]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.0]


@pytest.mark.parametrize("kwargs", [{}, {"normalize": False}, {"sample_weight": WEIGHTS}])
def test_accuracy_is_scikit_learns(kwargs):
    got = load_metric("accuracy").compute(predictions=PREDICTIONS, references=REFERENCES, **kwargs)
    assert got == {"accuracy": accuracy_score(REFERENCES, PREDICTIONS, **kwargs)}


@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_f1_is_scikit_learns(average):
    got = load_metric("f1").compute(predictions=PREDICTIONS, references=REFERENCES, average=average)
    assert got == {"f1": f1_score(REFERENCES, PREDICTIONS, average=average)}


def test_f1_of_each_class_is_a_plain_list():
    got = load_metric("f1").compute(predictions=PREDICTIONS, references=REFERENCES, average=None)
    assert got == {"f1": f1_score(REFERENCES, PREDICTIONS, average=None).tolist()}


@pytest.mark.parametrize("pos_label", [0, 1])
def test_binary_f1_is_scikit_learns(pos_label):
    got = load_metric("f1").compute(predictions=BINARY_PREDICTIONS, references=BINARY_REFERENCES, pos_label=pos_label)
    assert got == {"f1": f1_score(BINARY_REFERENCES, BINARY_PREDICTIONS, pos_label=pos_label)}


@pytest.mark.parametrize("kwargs", [{}, {"sample_weight": WEIGHTS}])
def test_matthews_correlation_is_scikit_learns(kwargs):
    got = load_metric("matthews_correlation").compute(predictions=PREDICTIONS, references=REFERENCES, **kwargs)
    assert got == {"matthews_correlation": matthews_corrcoef(REFERENCES, PREDICTIONS, **kwargs)}


VALUES, OTHERS = [0.1, 0.2, 0.7, 0.6, 1e-9], [1.0, 1.5, 9.0, 2.0, 0.5]


@pytest.mark.parametrize("name", ["pearsonr", "spearmanr"])
def test_correlations_are_scipys(name):
    got = load_metric(name).compute(predictions=VALUES, references=OTHERS)
    assert got == {name: getattr(stats, name)(OTHERS, VALUES).statistic}
    assert got != load_metric(name).compute(predictions=VALUES, references=OTHERS[::-1])


@pytest.mark.parametrize("name, kwargs", [("accuracy", {}), ("f1", {"average": "macro"}), ("matthews_correlation", {})])
def test_one_changed_prediction_changes_the_value(name, kwargs):
    """The sibling that must fail: an equality that a wrong prediction survived would show nothing."""
    metric, changed = load_metric(name), [1, *PREDICTIONS[1:]]
    straight = metric.compute(predictions=PREDICTIONS, references=REFERENCES, **kwargs)
    assert metric.compute(predictions=changed, references=REFERENCES, **kwargs) != straight


def test_predictions_and_references_do_not_change_places():
    """Only the weighted average, by the references' counts, can tell them apart."""
    metric = load_metric("f1")
    straight = metric.compute(predictions=PREDICTIONS, references=REFERENCES, average="weighted")
    swapped = metric.compute(predictions=REFERENCES, references=PREDICTIONS, average="weighted")
    assert straight != swapped


def test_batches_add_up():
    metric = load_metric("accuracy")
    metric.add_batch(predictions=PREDICTIONS[:3], references=REFERENCES[:3])
    metric.add_batch(predictions=PREDICTIONS[3:], references=REFERENCES[3:])
    assert metric.compute() == {"accuracy": accuracy_score(REFERENCES, PREDICTIONS)}


@pytest.mark.parametrize("name", available_metrics())
def test_every_shipped_metric_loads(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.EvaluationModule)
    assert metric.name == name


@pytest.mark.parametrize("name", ["acuracy", "", "../metrics/accuracy", "accuracy/accuracy.py"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(MemTuneError, match="available: accuracy, f1"):
        load_metric(name)


NO_NETWORK = """
import socket

class NetworkTouched(BaseException):
    "Not an Exception, so that no library's fallback can swallow it."

def refuse(*args, **kwargs):
    raise NetworkTouched(args)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


LOADING = f"""
from hf_memtune.evaluation import load_metric
print("ours:", load_metric("accuracy").compute(predictions={PREDICTIONS}, references={REFERENCES}), flush=True)
import evaluate
evaluate.load("accuracy")
"""


def test_loading_touches_no_network(tmp_path):
    """In a fresh process with an empty home and no offline switch, which would hide an attempt.

    The sibling that must fail, after it: the hub's own metric of that name.
    """
    done = _python(NO_NETWORK + LOADING, HOME=str(tmp_path), PYTHONPATH=_package_parent())
    assert done.stdout.startswith("ours: {'accuracy': "), done.stderr
    assert done.returncode != 0 and "NetworkTouched" in done.stderr


def test_importing_the_package_does_not_import_evaluate(tmp_path):
    code = "import sys, hf_memtune.evaluation\nassert not {'evaluate', 'sklearn'} & set(sys.modules)"
    done = _python(code, HOME=str(tmp_path), PYTHONPATH=_package_parent())
    assert done.returncode == 0, done.stderr


def _package_parent() -> str:
    return str(Path(hf_memtune.evaluation.__file__).parents[2])
