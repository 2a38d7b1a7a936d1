"""transformers' label smoothing of logits that are made on demand: the same loss, without the logits."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from hf_memtune.core.logits import LazyLogits


@dataclass
class LabelSmootherOnDemand(LabelSmoother):
    """(1 - epsilon) CE(z, y) + epsilon / V sum over classes of CE(z, class), which is torch's cross entropy with label smoothing.

    Of other logits, and of labels that are no classes of tokens, the loss is transformers' own.
    """

    def __call__(self, model_output: Any, labels: Tensor, shift_labels: bool = False, **count: Any) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, LazyLogits) or labels.shape != logits.shape[:-1]:
            return super().__call__(model_output, labels, shift_labels, **count)
        if shift_labels:
            logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        total = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="sum", label_smoothing=self.epsilon
        )
        items = count.get("num_items_in_batch")
        return total / ((labels != self.ignore_index).sum() if items is None else items)
