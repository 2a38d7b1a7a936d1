"""What a batch asks of a step: the label of each position's own prediction, and the inputs of the model without them.

Shape legend: B rows of a batch, T tokens in a row.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hf_memtune.architectures import Architecture, Task
from hf_memtune.core.loss import IGNORED
from hf_memtune.errors import MemTuneError

LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


def targets(architecture: Architecture, labels: dict[str, Tensor]) -> Tensor | None:
    """(B, T) int64: the label of each position's own prediction, or None where the loss is not per token."""
    if not architecture.task.loss_per_token or "labels" not in labels:
        return None
    if architecture.task is not Task.CAUSAL_LM:
        return labels["labels"]
    if "shift_labels" in labels:
        return labels["shift_labels"]
    return F.pad(labels["labels"][:, 1:], (0, 1), value=IGNORED)


def model_inputs(architecture: Architecture, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with while passes run: labels taken out where the loss is per token."""
    if not architecture.task.loss_per_token:
        return {k: v for k, v in inputs.items() if k not in LABEL_NAMES}
    given = {k: v for k, v in inputs.items() if k not in (*LABEL_NAMES, "num_items_in_batch")}
    if not isinstance(given.get("logits_to_keep", 0), int) or given.get("logits_to_keep", 0):
        raise MemTuneError("the batch has logits_to_keep, but which logits there are follows from the labels here. Leave it out.")
    model = architecture.head_model
    if architecture.is_encoder_decoder and "decoder_input_ids" not in given and "decoder_inputs_embeds" not in given:
        given["decoder_input_ids"] = _shifted_right(model, inputs.get("labels"))
    return given


def _shifted_right(model, labels: Tensor | None) -> Tensor:
    """The decoder's input as the model makes it from labels."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or labels is None:
        why = "has no labels to make them from" if labels is None else "cannot make them from labels outside its own forward"
        raise MemTuneError(
            f"the batch has neither decoder_input_ids nor decoder_inputs_embeds, and {type(model).__name__} {why}: "
            "put decoder_input_ids into the batch."
        )
    return shift(labels=labels)
