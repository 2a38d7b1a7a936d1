"""The loss of a linear head without its logits, against torch's cross entropy of all of them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_memtune.core import loss as loss_module
from hf_memtune.core.loss import IGNORED, LinearLoss, linear_loss, linear_loss_gradient
from hf_memtune.errors import LogitsError
from hf_memtune.memory import LiveBytes
from tests.support.tolerances import NOTICED, RELATIVE, close

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(tokens=37, size=16, classes=53, dtype=torch.float64, bias=True, ignored=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, size, dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (tokens,)).masked_fill(torch.rand(tokens) < ignored, IGNORED)
    return hidden, weight, torch.randn(classes, dtype=dtype, requires_grad=True) if bias else None, target


def token_weights(tokens=37):
    """Weights of tokens as a draw makes them, float32, with one that is 0."""
    return (3 * torch.rand(tokens, generator=torch.Generator().manual_seed(1))).index_fill(0, torch.tensor([2]), 0)


def plain(hidden, weight, bias, target, label_smoothing=0.0, token_weight_N=None):
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    return losses.sum() if token_weight_N is None else (losses * token_weight_N).sum()


def with_gradients(function, hidden, weight, bias, target, *more, **options):
    value = function(hidden, weight, bias, target, *more, **options)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.fixture(params=[16, 1000], ids=["chunks", "one chunk"])
def chunked(request, monkeypatch):
    """Rows of logits alive at a time."""
    monkeypatch.setattr(loss_module, "logit_rows", lambda classes: request.param)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_those_of_the_logits(chunked, dtype, bias, smoothing):
    tensors = problem(dtype=dtype, bias=bias)
    found = with_gradients(linear_loss, *tensors, label_smoothing=smoothing)
    expected = with_gradients(plain, *tensors, label_smoothing=smoothing)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= RELATIVE[dtype] * theirs.norm()


@pytest.mark.parametrize("weights", [None, token_weights()], ids=["plain sum", "weighted"])
def test_half_precision_is_as_near_to_float64_as_the_plain_loss(chunked, weights):
    """No tuned tolerance: our error may not exceed that of the plain computation in the same dtype."""
    half, options = problem(dtype=torch.bfloat16), {"token_weight_N": weights}
    exact = with_gradients(plain, *[t.detach().double().requires_grad_() for t in half[:3]], half[3], **options)
    found, theirs = with_gradients(linear_loss, *half, **options), with_gradients(plain, *half, **options)
    assert found[0].dtype == torch.float32
    for ours, plainly, true in zip(found, theirs, exact):
        assert (ours.double() - true).norm() <= 1.05 * (plainly.double() - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_that_is_not_trained(chunked, dtype, bias):
    hidden, weight, bias_V, target = problem(dtype=dtype, bias=bias)
    weight, bias_V = weight.detach(), None if bias_V is None else bias_V.detach()
    (found,), (expected,) = (torch.autograd.grad(loss(hidden, weight, bias_V, target), [hidden]) for loss in (linear_loss, plain))
    assert (found - expected).norm() <= RELATIVE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_head_has_one_gradient_in_memory(dtype):
    tensors = problem(tokens=8, classes=4096, dtype=dtype, bias=False)
    loss = linear_loss(*tensors)
    with LiveBytes() as live:
        loss.backward()
    assert live.peak_bytes < tensors[1].nbytes / 10  # it was made in forward: the scalars of backward alone


def test_a_second_gradient_in_memory_would_be_noticed():
    """The sibling: autograd makes the gradient in backward."""
    *tensors, target = problem(tokens=8, classes=4096, dtype=torch.float32, bias=False)
    loss = plain(*tensors, target)
    with LiveBytes() as live:
        loss.backward()
    assert live.peak_bytes >= tensors[1].nbytes


def finite_differences(function, tensors, step=1e-6):
    """Central differences of a scalar function, one entry at a time: what gradcheck does, with one backward a graph."""
    found = []
    for tensor in tensors:
        slope = torch.zeros_like(tensor)
        for entry in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.view(-1)[entry] += sign * step
                    ends.append(function(*tensors))
                    tensor.view(-1)[entry] -= sign * step
            slope.view(-1)[entry] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found


@pytest.mark.parametrize("weights", [None, token_weights(5)], ids=["plain sum", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_the_slopes_of_the_loss(chunked, smoothing, weights):
    *tensors, target = problem(tokens=5, size=3, classes=4)

    def loss(*tensors):
        return LinearLoss.apply(*tensors, target, smoothing, weights)

    gradients = torch.autograd.grad(loss(*tensors), tensors)
    for gradient, slope in zip(gradients, finite_differences(loss, [t.detach() for t in tensors]), strict=True):
        assert (gradient - slope).abs().max() < 1e-8


def test_a_second_backward_raises_instead_of_scaling_twice():
    *tensors, target = problem()
    loss = LinearLoss.apply(*tensors, target, 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(LogitsError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_cost_nothing(chunked, dtype):
    hidden, weight, bias, _ = problem(dtype=dtype)
    found = with_gradients(linear_loss, hidden, weight, bias, torch.full((37,), IGNORED))
    assert all((part == 0).all() for part in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_cost_nothing_and_still_have_a_gradient(dtype):
    """A batch may keep no labelled token; under distributed training every parameter must take part all the same."""
    tensors = problem(tokens=0, dtype=dtype)
    value, *gradients = with_gradients(linear_loss, tensors[0], tensors[1], None, tensors[3])
    assert value == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("above", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("tokens", [0, 37])
def test_a_batch_without_labels_has_no_gradient_whatever_comes_from_above(chunked, tokens, above):
    """A mean over no label sends inf or nan, of which torch's own loss makes exactly 0."""
    hidden, weight, bias, _ = problem(tokens=tokens)
    for loss in (linear_loss, plain):
        value = loss(hidden, weight, bias, torch.full((tokens,), IGNORED)) * above
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, [hidden, weight, bias]))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("above", [float("inf"), float("nan")])
def test_ignored_tokens_have_no_gradient_whatever_comes_from_above(chunked, trained, above):
    hidden, weight, bias, target = problem()
    weight, bias = weight.requires_grad_(trained), bias.requires_grad_(trained)
    (gradient,) = torch.autograd.grad(linear_loss(hidden, weight, bias, target) * above, [hidden])
    assert (gradient[target == IGNORED] == 0).all()
    assert not gradient[target != IGNORED].isfinite().any()  # the sibling: what is labelled shows what came


def test_differentiating_twice_raises():
    hidden, weight, bias, target = problem()
    with pytest.raises(LogitsError, match="once only"):
        torch.autograd.grad(linear_loss(hidden, weight, bias, target), [hidden], create_graph=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, token_weights()], ids=["plain sum", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradient_the_loss_is_the_same(chunked, dtype, weights, smoothing):
    tensors = problem(dtype=dtype)
    with torch.no_grad():
        found = linear_loss(*tensors, smoothing, weights)
    expected = linear_loss(*tensors, smoothing, weights)
    assert found.dtype == expected.dtype and not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), **close(dtype))


# -- pointwise operations --------------------------------------------------------------------------------------------


def capped(logits):
    return torch.tanh(logits / 2) * 2


@pytest.mark.parametrize("weights", [None, token_weights()], ids=["plain sum", "weighted"])
@pytest.mark.parametrize("pointwise", [capped, torch.tanh, lambda x: x * 3], ids=["capped", "tanh", "scaled"])
def test_loss_and_gradients_of_changed_logits(chunked, pointwise, weights):
    *tensors, target = problem()

    def changed(hidden, weight, bias, pointwise):
        losses = F.cross_entropy(pointwise(F.linear(hidden, weight, bias)), target, reduction="none")
        return (losses if weights is None else losses * weights).sum()

    value = linear_loss(*tensors, target, token_weight_N=weights, pointwise=pointwise)
    found = value.detach(), *torch.autograd.grad(value, tensors)
    expected, other = (with_gradients(changed, *tensors, p) for p in (pointwise, lambda x: x))
    torch.testing.assert_close(found, expected, **close(torch.float64))
    assert all((ours - theirs).norm() > NOTICED * theirs.norm() for ours, theirs in zip(found, other))
    with torch.no_grad():
        torch.testing.assert_close(
            linear_loss(*tensors, target, token_weight_N=weights, pointwise=pointwise), found[0], **close(torch.float64)
        )


def test_another_target_is_noticed(chunked):
    hidden, weight, bias, target = problem()
    found = with_gradients(linear_loss, hidden, weight, bias, target)
    wrong = with_gradients(plain, hidden, weight, bias, target.roll(1))
    assert all((ours - theirs).norm() > NOTICED * theirs.norm() for ours, theirs in zip(found, wrong))


# -- token weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_loss_and_gradients_are_those_of_the_weighted_logits(chunked, dtype, bias, smoothing):
    tensors, weights = problem(dtype=dtype, bias=bias), token_weights()
    found = with_gradients(linear_loss, *tensors, label_smoothing=smoothing, token_weight_N=weights)
    expected = with_gradients(plain, *tensors, label_smoothing=smoothing, token_weight_N=weights)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= RELATIVE[dtype] * theirs.norm()


@pytest.mark.parametrize("wrong", [None, token_weights().roll(1)], ids=["none", "of other tokens"])
def test_other_weights_are_noticed(chunked, wrong):
    tensors = problem()
    found = with_gradients(linear_loss, *tensors, token_weight_N=token_weights())
    others = with_gradients(plain, *tensors, token_weight_N=wrong)
    assert all((ours - theirs).norm() > NOTICED * theirs.norm() for ours, theirs in zip(found, others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_one_change_nothing(chunked, dtype):
    *tensors, target = problem(dtype=dtype)
    found = with_gradients(LinearLoss.apply, *tensors, target, 0.0, torch.ones(37))
    expected = with_gradients(LinearLoss.apply, *tensors, target, 0.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_weight_zero_costs_nothing(chunked, dtype):
    hidden, weight, bias, target = problem(dtype=dtype, ignored=0)
    _, gradient, *_ = with_gradients(linear_loss, hidden, weight, bias, target, token_weight_N=token_weights())
    assert (gradient[2] == 0).all() and (gradient[3] != 0).any()


def test_weights_are_constants():
    *tensors, target = problem()
    weights = token_weights().requires_grad_()
    linear_loss(*tensors, target, token_weight_N=weights).backward()
    assert weights.grad is None and tensors[0].grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_have_no_weights_and_still_a_gradient(dtype):
    tensors = problem(tokens=0, dtype=dtype)
    value, *gradients = with_gradients(linear_loss, *tensors, token_weight_N=torch.zeros(0))
    assert value == 0 and len(gradients) == 3 and all((g == 0).all() for g in gradients)


def test_weights_work_under_autocast(chunked):
    tensors, weights = problem(dtype=torch.float32), token_weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(linear_loss, *tensors, token_weight_N=weights)
    expected = with_gradients(plain, *tensors, token_weight_N=weights)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= RELATIVE[torch.bfloat16] * theirs.norm()


def test_a_head_of_half_precision_is_rounded_once_for_many_tokens(monkeypatch):
    """As near to float64 as the plain loss. The sibling: rounded for each of as many tokens as have logits at a time, it is not."""
    monkeypatch.setattr(loss_module, "logit_rows", lambda classes: 16)
    half = problem(tokens=1024, dtype=torch.bfloat16)
    exact = with_gradients(plain, *[t.detach().double().requires_grad_() for t in half[:3]], half[3])

    def error(function):
        return [(ours.double() - true).norm() / true.norm() for ours, true in zip(with_gradients(function, *half)[2:], exact[2:])]

    theirs, ours = error(plain), error(linear_loss)
    monkeypatch.setattr(loss_module, "RESIDUAL_BYTES", 0)
    coarse = error(linear_loss)
    assert all(our <= 1.05 * their + 1e-3 for our, their in zip(ours, theirs))
    assert coarse[0] > 3 * theirs[0]


class Products(TorchDispatchMode):
    """Dtypes and sizes of the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, given=(), options=None):
        out = function(*given, **(options or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.found.append((out.dtype, out.shape))
        return out


def test_autocast_takes_part_in_the_gradient_of_a_float32_head(monkeypatch, chunked):
    """As it does in that of autograd. No product in float32, none of all classes, and the sum is float32."""
    monkeypatch.setattr(loss_module, "LOGIT_CHUNK_BYTES", 20 * 16 * 4)
    *tensors, target = problem(dtype=torch.float32)
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, weight, bias = with_gradients(linear_loss, *tensors, target)
    assert weight.dtype == bias.dtype == torch.float32
    assert {dtype for dtype, _ in products.found} == {torch.bfloat16}
    assert {shape for _, shape in products.found if shape[1] == 16 and shape[0] != 37} >= {(20, 16), (13, 16)}
    with Products() as products:  # the sibling
        with_gradients(linear_loss, *tensors, target)
    assert {dtype for dtype, _ in products.found} == {torch.float32}


def test_autocast_to_float16_sums_tokens_in_float32():
    """No scaler has scaled what is summed yet; in float16 it would be infinite, and stay so whatever the scale."""
    torch.manual_seed(0)
    hidden, weight = torch.full((1024, 4), 200.0), torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        (found,) = torch.autograd.grad(linear_loss(hidden, weight, None, torch.ones(1024, dtype=torch.int64)), [weight])
    assert torch.isfinite(found).all() and found.abs().max() > torch.finfo(torch.float16).max


def test_autocast_to_float16_keeps_what_many_unlikely_classes_add_to_the_gradient():
    """Probabilities of 3e-8 each, which float16 rounds to 6e-8; a scaler that works on the loss comes too late for them."""
    classes = 4096
    hidden, weight = torch.ones(2, 1), torch.full((classes, 1), 1.0)
    bias = torch.full((classes,), -17.3)
    bias[0] = 0.0
    target = torch.zeros(2, dtype=torch.int64)
    weight[0] = 0.0  # of the likely class nothing comes
    exact, _ = linear_loss_gradient(hidden.double(), weight.double(), bias.double() - torch.eye(classes)[0].double(), target)
    with torch.autocast("cpu", dtype=torch.float16):
        found, _ = linear_loss_gradient(hidden, weight, bias - torch.eye(classes)[0], target)
    assert found.double() == pytest.approx(exact, rel=0.03)


# -- the gradient without autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_without_autograd_is_autograds(chunked, dtype, bias):
    hidden, weight, bias_V, target = problem(dtype=dtype, bias=bias)
    gradient, losses = linear_loss_gradient(hidden, weight, bias_V, target)
    value, expected, *_ = with_gradients(plain, hidden, weight, bias_V, target)
    assert gradient.dtype == dtype and losses.shape == target.shape
    assert (gradient - expected).norm() <= RELATIVE[dtype] * expected.norm()
    torch.testing.assert_close(losses.sum(), value, **close(dtype))
    assert (losses[target == IGNORED] == 0).all() and (gradient[target == IGNORED] == 0).all()


def test_weights_scale_the_gradient_and_not_the_token_losses(chunked):
    hidden, weight, bias, target = problem()
    buffers = torch.zeros_like(weight), torch.zeros_like(bias)
    gradient, losses = linear_loss_gradient(hidden, weight, bias, target, 0.0, *buffers, token_weights())
    plainly, unweighted = linear_loss_gradient(hidden, weight, bias, target)
    expected = with_gradients(plain, hidden, weight, bias, target, token_weight_N=token_weights())[1:]
    assert losses.equal(unweighted)
    torch.testing.assert_close((gradient, *buffers), tuple(expected), **close(torch.float64))
    assert (gradient - plainly).norm() > NOTICED * plainly.norm()


def test_the_gradient_leaves_its_arguments_alone(chunked):
    tensors = *problem(), token_weights()
    before = [t.detach().clone() for t in tensors]
    linear_loss_gradient(*tensors[:4], token_weight_N=tensors[4])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_the_gradient_of_nothing_is_nothing():
    hidden, weight, bias, target = problem(tokens=0)
    gradient, losses = linear_loss_gradient(hidden, weight, bias, target)
    assert gradient.shape == (0, 16) and losses.shape == (0,)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((3, 4), 60.0), torch.tensor([[60.0] * 4, [-60.0] * 4])
    gradient, losses = linear_loss_gradient(hidden, weight, None, torch.tensor([0, 1, 0]))
    assert torch.isfinite(gradient).all() and torch.isfinite(losses).all()
    assert losses[1] == pytest.approx(2 * 60 * 60 * 4)


def test_logits_that_are_made_wider_first(chunked):
    """A loss of float64, of a float32 head, with tokens that have no label."""
    hidden, weight, bias, target = problem(dtype=torch.float32)
    value, *gradients = with_gradients(linear_loss, hidden, weight, bias, target, pointwise=lambda logits: logits.double() / 2)
    expected = F.cross_entropy(F.linear(hidden, weight, bias).double() / 2, target, reduction="sum")
    torch.testing.assert_close(value.double(), expected.detach(), **close(torch.float32))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [hidden, weight, bias])):
        assert (ours - theirs).norm() <= RELATIVE[torch.float32] * theirs.norm()


# -- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(function):
    hidden, weight, _, target = problem(tokens=2048, size=8, classes=512, dtype=torch.float32)
    with LiveBytes() as live:
        function(hidden, weight, None, target).backward()
    return live.peak_bytes


def test_residuals_of_a_head_of_half_precision_are_bounded(monkeypatch):
    """Logits in float32 of LOGIT_CHUNK_BYTES, residuals in half precision of RESIDUAL_BYTES."""
    monkeypatch.setattr(loss_module, "LOGIT_CHUNK_BYTES", 64 * 512 * 4)
    hidden, weight, _, target = problem(tokens=2048, size=8, classes=512, dtype=torch.bfloat16)

    def peak(tokens):
        monkeypatch.setattr(loss_module, "RESIDUAL_BYTES", tokens * 512 * 2)
        with LiveBytes() as live:
            linear_loss(hidden, weight, None, target)
        return live.peak_bytes

    small, large = peak(256), peak(1024)
    assert 0.9 <= (large - small) / (768 * 512 * 2) <= 1.1
    assert large < 2048 * 512 * 2  # all of the logits in half precision


def test_logits_never_exist_all_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGIT_CHUNK_BYTES", 64 * 512 * 4)
    all_logits = 2048 * 512 * 4
    assert peak_bytes(linear_loss) < all_logits / 4
    assert peak_bytes(plain) > all_logits  # the sibling
