"""What the tests of all tokens share with others."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.runs import pad_right, worst_step
from tests.support.tolerances import FLOAT32_INSIDE


def assert_equal_runs(ours, plain, allowed=FLOAT32_INSIDE):
    assert worst_step(ours, plain) <= allowed
    assert ours.losses == pytest.approx(plain.losses, rel=FLOAT32_INSIDE)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(ours.parameters[name], parameter, rtol=allowed, atol=allowed)


def shifting_loss(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, on ordinary logits: it shifts by itself and divides by the number it is given."""
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = F.cross_entropy(logits, target, reduction="none")
    return (losses + 0.1 * losses**2).sum() / num_items_in_batch


def pad_pairs(rows):
    batch = pad_right([{"input_ids": row["input_ids"], "labels": row["target"]} for row in rows], padding=1)
    shifted = batch["labels"].roll(1, 1).masked_fill(batch["labels"].roll(1, 1) == -100, 1)
    shifted[:, 0] = 2  # BART's decoder_start_token_id; given, because transformers' label smoothing takes the labels away
    return batch | {"decoder_input_ids": shifted}
