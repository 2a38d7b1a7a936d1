"""What the tests of heads share with others."""

import torch

from tests.support.stepping import model_and_batch

PROBLEMS = {
    "single label": dict(problem_type="single_label_classification", num_labels=3),
    "multi label": dict(problem_type="multi_label_classification", num_labels=3),
    "regression": dict(problem_type="regression", num_labels=1),
}


def classified(name, side, problem="single label"):
    """A sequence classifier and its batch, with labels of the problem's type."""
    model, batch, dtype = model_and_batch(name, side, "sequence_classification", **PROBLEMS[problem])
    rows = batch["input_ids"].shape[0]
    if problem == "multi label":
        batch["labels"] = torch.eye(3, dtype=dtype)[:rows]
    if problem == "regression":
        batch["labels"] = torch.linspace(-1, 2, rows, dtype=dtype)
    return model, batch, dtype
