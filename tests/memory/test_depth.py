"""Deep models from short ones: to the byte, where layers repeat as they are taken to."""

import pytest
import torch
from torch import nn

from hf_memtune.memory.depth import Depths, depths_of, extrapolate, signature_of
from hf_memtune.memory.step_ledger import StepLedger
from tests.support.tiny_models import batch_for, tiny_model


def log_of(layers, wide=()):
    """A step of a model with so many layers, those of `wide` with an MLP of twice the width."""
    model = tiny_model("llama", dtype=torch.float32, num_hidden_layers=layers)
    for number in wide:
        if number < layers:
            mlp = model.model.layers[number].mlp
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(96, 32)
    batch, optimizer = batch_for(model, lengths=(32, 32)), torch.optim.AdamW(model.parameters())
    with StepLedger(model, optimizer, list(batch.values())) as ledger:
        ledger.stretch_at(model.model.layers[0])
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    return ledger, [signature_of(layer) for layer in model.model.layers]


def test_equal_layers_are_extrapolated_to_the_byte():
    few, more, deep = (log_of(layers)[0] for layers in (2, 3, 9))
    assert extrapolate(few.log, more.log, 7).phases == deep.account().phases


def test_layers_that_alternate_are_extrapolated_by_pairs_and_not_one_by_one():
    wide = range(1, 99, 2)
    deep, signatures = log_of(10, wide)
    depths = depths_of(signatures)
    assert depths == Depths(4, 6, 10)
    few, more = (log_of(layers, wide)[0] for layers in (depths.shorter, depths.longer))
    assert extrapolate(few.log, more.log, depths.steps).phases == deep.account().phases
    few, more = (log_of(layers, wide)[0] for layers in (2, 3))  # the sibling: as if the period were one
    assert extrapolate(few.log, more.log, 8).phases != deep.account().phases


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("aaaaaaaa", Depths(2, 3, 8)),
        ("abababab", Depths(4, 6, 8)),
        ("xabababab", Depths(5, 7, 9)),
        ("aaaaaaab", None),
        ("aaa", None),
        ("abcabcabca", None),
        ("aabaabaabaabaa", Depths(8, 11, 14)),
    ],
)
def test_depths_to_trace(kinds, expected):
    assert depths_of(list(kinds)) == expected


def test_logs_of_different_stretches_tell_nothing():
    few, more = log_of(2)[0], log_of(3)[0]
    more.log.turn("evaluation")
    assert extrapolate(few.log, more.log, 1) is None


def test_the_signature_sees_sizes_and_kinds():
    small, same, other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)
    assert signature_of(small) == signature_of(same) != signature_of(other)
    assert signature_of(small, "sliding") != signature_of(small, "full")
    same.weight.requires_grad_(False)
    assert signature_of(small) != signature_of(same)
