"""The formulas of the scores, against the whole attention matrix and against hand-made numbers."""

import pytest
import torch

from hf_memtune.core.scoring import attention_received, combined_score, gradient_magnitude, minmax
from tests.support.tolerances import NOTICED, close


def tensors(rows=2, heads=4, groups=2, length=12, channels=8, dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(rows, heads, length, channels, dtype=dtype)
    return query, torch.randn(rows, heads // groups, length, channels, dtype=dtype)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def rows_of(mask, prefix=False):
    """The mask of some query rows; with `prefix`, over no more keys than exist by then."""

    def visible(start, stop):
        keys = stop if prefix else mask.shape[-1]
        return mask[:, :, start:stop, :keys], keys

    return visible


def whole(query, key, mask, scaling=0.3, softcap=None, sinks=None, real=None):
    """(received, seen_by) of the matrix in one piece."""
    products = scaling * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    if softcap:
        products = softcap * torch.tanh(products / softcap)
    products = products.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        products = torch.cat([products, sinks.view(1, -1, 1, 1).expand(*products.shape[:3], 1)], -1)
    weights = products.softmax(-1)[..., : key.shape[2]].mean(1)
    counted = torch.ones(query.shape[0], query.shape[2]) if real is None else real
    seen = (mask[:, 0].expand(weights.shape) * counted[:, :, None]).sum(1)
    return (weights * counted[:, :, None]).sum(1), seen.to(query.dtype)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("row_chunk", [1, 5, 12, 100, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_of_rows_sum_to_the_whole(row_chunk, prefix, dtype):
    query, key = tensors(dtype=dtype)
    found = attention_received(query, key, rows_of(causal(12), prefix), scaling=0.3, row_chunk=row_chunk)
    for ours, expected in zip(found, whole(query, key, causal(12))):
        torch.testing.assert_close(ours, expected, **close(dtype))


@pytest.mark.parametrize("options", [dict(softcap=0.5), dict(sinks=torch.tensor([2.0, -1.0, 0.0, 1.0], dtype=torch.float64))], ids=str)
def test_softcap_and_sinks_change_the_weights_as_in_the_models(options):
    query, key = tensors()
    found, _ = attention_received(query, key, rows_of(causal(12)), scaling=0.3, row_chunk=5, **options)
    torch.testing.assert_close(found, whole(query, key, causal(12), **options)[0], **close(torch.float64))
    assert (found - whole(query, key, causal(12))[0]).abs().max() > NOTICED


def test_padding_gives_no_attention():
    query, key = tensors()
    real = torch.arange(12) < torch.tensor([12, 7])[:, None]
    mask = causal(12) & real[:, None, None]
    found = attention_received(query, key, rows_of(mask), scaling=0.3, real=real, row_chunk=5)
    for ours, expected in zip(found, whole(query, key, mask, real=real)):
        torch.testing.assert_close(ours, expected, **close(torch.float64))
    assert (found[0][1, 7:] == 0).all()
    torch.testing.assert_close(found[0].sum(1), real.sum(1).double(), **close(torch.float64))  # each real row gives 1 away


def test_rows_that_see_nothing_do_not_become_nan():
    query, key = tensors()
    real = torch.arange(12) >= torch.tensor([0, 5])[:, None]
    mask = causal(12) & real[:, None, None]
    received, seen_by = attention_received(query, key, rows_of(mask), scaling=0.3, real=real)
    assert torch.isfinite(received).all()
    torch.testing.assert_close(received.sum(1), real.sum(1).double(), **close(torch.float64))


def test_without_a_mask_every_key_is_seen():
    query, key = tensors()
    received, seen_by = attention_received(query, key, lambda start, stop: (None, 12), scaling=0.3, row_chunk=5)
    torch.testing.assert_close(received, whole(query, key, torch.ones(1, 1, 12, 12, dtype=torch.bool))[0], **close(torch.float64))
    assert (seen_by == 12).all()


def test_half_precision_is_summed_in_float32():
    query, key = tensors(dtype=torch.bfloat16)
    received, _ = attention_received(query, key, rows_of(causal(12)), scaling=0.3)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received, whole(query.float(), key.float(), causal(12))[0], **close(torch.bfloat16))


@pytest.mark.parametrize("norm, expected", [("l2", [5.0, 0.0]), ("l1", [7.0, 0.0]), ("sum", [-1.0, 0.0])])
def test_gradient_norms(norm, expected):
    assert gradient_magnitude(torch.tensor([[[3.0, -4.0], [0.0, 0.0]]]), norm).tolist() == [expected]


def test_half_precision_gradients_do_not_overflow():
    assert torch.isfinite(gradient_magnitude(torch.full((1, 1, 64), 6e4, dtype=torch.float16), "l2")).all()


def test_minmax_of_each_row():
    scores = torch.tensor([[1.0, 3.0, 2.0, 99.0], [5.0, 5.0, 5.0, 5.0]])
    real = torch.tensor([[True, True, True, False], [True] * 4])
    assert minmax(scores, real)[0, :3].tolist() == [0.0, 1.0, 0.5]
    assert minmax(scores, real)[1].tolist() == [0.0] * 4  # all equal: nothing to tell apart
    assert minmax(scores)[0].tolist() != minmax(scores, real)[0].tolist()


def test_combined_score_is_equation_5():
    context, gradient = torch.tensor([[1.0, torch.e, 0.0]]), torch.tensor([[0.0, 4.0, 2.0]])
    found = combined_score(context, gradient, 2.0, 3.0)
    assert found[0, :2].tolist() == pytest.approx([0.0, 5.0])
    assert torch.isfinite(found).all()  # a token nobody attends to is last, not -inf
