"""The gradient of a matrix that embeds and classifies, against autograd's own."""

import pytest
import torch
import torch.nn.functional as F

from hf_memtune.core import tied
from hf_memtune.core.loss import linear_loss
from hf_memtune.core.tied import embed_summed, embed_tied
from hf_memtune.errors import LogitsError
from hf_memtune.memory import LiveBytes
from tests.support.tolerances import NOTICED, RELATIVE

TOKENS, CLASSES, SIZE = 40, 23, 8  # more tokens than classes: most come more than once


def problem(dtype=torch.float64, tokens=TOKENS, classes=CLASSES):
    torch.manual_seed(0)
    weight = torch.randn(classes, SIZE, dtype=dtype, requires_grad=True)
    return weight, torch.randint(0, classes, (2, tokens // 2)), torch.randint(0, classes, (tokens,))


def loss_of(embedded, weight, target):
    return linear_loss(embedded.tanh().flatten(0, 1), weight, None, target)


def linked(weight, ids, target, padding_idx=None):
    embedded, of_head = embed_tied(weight, ids, padding_idx)
    return torch.autograd.grad(loss_of(embedded, of_head, target), weight)[0]


def plain(weight, ids, target, padding_idx=None):
    embedded = F.embedding(ids, weight, padding_idx)
    logits = F.linear(embedded.tanh().flatten(0, 1), weight)
    return torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), weight)[0]


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gradient_is_that_of_both_uses(dtype, padding_idx):
    found, expected = linked(*problem(dtype), padding_idx), plain(*problem(dtype), padding_idx)
    assert (found - expected).norm() <= RELATIVE[dtype] * expected.norm()


@pytest.mark.parametrize("shape, dtype", [((), torch.long), ((4,), torch.int32), ((2, 1, 3), torch.long), ((0, 2), torch.long)])
def test_ids_of_any_shape(shape, dtype):
    weight, ids, _ = problem()
    ids = ids.flatten()[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    embedded, _ = embed_tied(weight, ids)
    assert embedded.shape == (*shape, SIZE)
    (found,) = torch.autograd.grad(embedded.square().sum(), weight)
    (expected,) = torch.autograd.grad(F.embedding(ids, weight).square().sum(), weight)
    assert (found - expected).norm() <= RELATIVE[torch.float64] * expected.norm()


def test_a_use_that_is_left_out_would_be_noticed():
    """The sibling: neither the head's gradient alone, nor that with padding's rows, is the whole."""
    weight, ids, target = problem()
    expected = plain(weight, ids, target, 3)
    head = torch.autograd.grad(loss_of(F.embedding(ids, weight).detach(), weight, target), weight)[0]
    for wrong in (head, linked(weight, ids, target)):
        assert (wrong - expected).norm() > NOTICED * expected.norm()


def test_the_embedding_alone_and_the_head_alone_have_their_gradients():
    weight, ids, _ = problem()
    embedded, of_head = embed_tied(weight, ids)
    (alone,) = torch.autograd.grad(embedded.square().sum(), weight)
    expected = torch.autograd.grad(F.embedding(ids, weight).square().sum(), weight)[0]
    assert (alone - expected).norm() <= RELATIVE[torch.float64] * expected.norm()
    embedded, of_head = embed_tied(weight, ids)
    assert torch.equal(torch.autograd.grad(of_head.sum(), weight)[0], torch.ones_like(weight))


def test_a_frequent_token_keeps_its_small_gradients_in_half_precision():
    """Added one by one to a large sum in bfloat16, a thousand small numbers would all be lost; torch's embedding on a CPU loses most."""
    weight, ids = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1, 1000, dtype=torch.long)
    embedded, of_head = embed_tied(weight, ids)
    loss = 8 * of_head.sum() + 2**-8 * embedded.sum()
    (found,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([8 + 1000 / 256, 8.0]).to(torch.bfloat16)
    assert torch.equal(found, expected[:, None].expand(2, 4))
    one_by_one = torch.full((4,), 8, dtype=torch.bfloat16)
    for _ in range(1000):
        one_by_one += 2**-8
    assert torch.equal(one_by_one, torch.full((4,), 8, dtype=torch.bfloat16))


def backward_bytes(embed, tokens=64, classes=4096):
    """The most that backward makes, while the head's gradient, made in forward, is held."""
    weight, ids, target = problem(torch.bfloat16, tokens, classes)
    embedded, of_head = embed(weight, ids)
    hidden = embedded.flatten(0, 1)
    with LiveBytes() as live:
        loss = linear_loss(hidden, of_head, None, target)
        live.track(embedded)
        live.reset_peak()
        before = live.current_bytes
        loss.backward()
        return live.peak_bytes - before


def test_backward_makes_no_matrix_of_the_embedding_s_size():
    tokens, classes = 64, 4096
    made = (
        classes * 8 + 2 * tokens * 8  # which row takes a token's sum; which token that is; the order
        + 2 * tokens * SIZE * 4  # rows in float32, and their sums
        + 4  # the loss's own gradient
        - tokens  # which of them are labelled, gone by then
    )  # fmt: skip
    assert backward_bytes(embed_tied, tokens, classes) == made
    matrix = classes * SIZE * 2
    assert made < matrix and backward_bytes(lambda weight, ids: (F.embedding(ids, weight), weight), tokens, classes) > 1.9 * matrix


# -- summed where the gradient is ------------------------------------------------------------------------------------


def in_parts(weight, ids, padding_idx=None, parts=3):
    """The lookups of some tokens at a time, each with a backward pass of its own."""
    for part in ids.chunk(parts, dim=1):
        embed_summed(weight, part, padding_idx).square().sum().backward()
    return weight.grad


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_add_to_the_gradient_that_is_there(dtype, padding_idx, there):
    (weight, ids, _), (other, _, _) = problem(dtype), problem(dtype)
    for each in (weight, other):
        each.grad = torch.ones_like(each) if there else None
    before = weight.grad
    found = in_parts(weight, ids, padding_idx)
    F.embedding(ids, other, padding_idx).square().sum().backward()
    assert (found - other.grad).norm() <= RELATIVE[dtype] * other.grad.norm()
    assert found is before or not there
    weight.grad = None
    assert (in_parts(weight, ids[:, 1:], padding_idx) - other.grad).norm() > NOTICED * other.grad.norm()


def test_summing_in_place_makes_no_matrix():
    weight, ids, _ = problem(torch.bfloat16, 64, 4096)
    weight.grad, matrix = torch.zeros_like(weight), weight.nbytes
    plain, _, _ = problem(torch.bfloat16, 64, 4096)
    plain.grad = torch.zeros_like(plain)

    def peak(take):
        with LiveBytes() as live:
            take()
        return live.peak_bytes

    assert peak(lambda: in_parts(weight, ids)) < matrix <= peak(lambda: F.embedding(ids, plain).square().sum().backward())


def test_a_second_backward_is_refused():
    weight, ids, target = problem(torch.bfloat16)
    embedded, of_head = embed_tied(weight, ids)
    loss = loss_of(embedded, of_head, target)
    loss.backward(retain_graph=True)
    with pytest.raises(LogitsError, match="a second time"):
        loss.backward()


def test_traced_tensors_need_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        into = torch.zeros(CLASSES, SIZE)
        tied.add_rows(into, torch.zeros(TOKENS, dtype=torch.long), torch.zeros(TOKENS, SIZE), 0)
    assert into.shape == (CLASSES, SIZE)
