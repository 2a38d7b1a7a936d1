"""The label of each position's own prediction, of a batch that carries labels.

Shape legend: B rows of a batch, T tokens in a row.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_memtune.architectures import Architecture
from hf_memtune.core.loss import IGNORED

LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


def targets(architecture: Architecture, labels: dict[str, Tensor]) -> Tensor | None:
    """(B, T) int64: the label of each position's own prediction, or None where the loss is not per token."""
    if not architecture.task.loss_per_token or "labels" not in labels:
        return None
    if not architecture.shifts_labels:
        return labels["labels"]
    if "shift_labels" in labels:
        return labels["shift_labels"]
    return F.pad(labels["labels"][:, 1:], (0, 1), value=IGNORED)
