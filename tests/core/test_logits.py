"""Logits on demand, against the plain logits of the same head."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from hf_memtune.core import loss as loss_module
from hf_memtune.core.logits import HeadOnDemand, LazyLogits
from hf_memtune.core.loss import IGNORED
from hf_memtune.errors import LogitsError
from hf_memtune.memory import LiveBytes, SavedBytes, StepLedger
from tests.support.tolerances import NOTICED, RELATIVE, close

ROWS, TOKENS, SIZE, CLASSES = 3, 14, 8, 53
EXACT = close(torch.float64)


class Counted(HeadOnDemand):
    """Knows how often logits were made, and a loss without them."""

    made = fused = 0

    def __init__(self, head):
        super().__init__(self._counted(head), lambda: head.weight, head.bias)

    def _counted(self, head):
        def forward(hidden):
            self.made += 1
            return F.linear(hidden, head.weight, head.bias)

        return forward

    def cross_entropy(self, *args):
        self.fused += 1
        return super().cross_entropy(*args)


class Problem:
    """Hidden states, a head, labels, and the two tensors of logits."""

    def __init__(self, dtype=torch.float64, bias=True, rows=ROWS, tokens=TOKENS, size=SIZE, classes=CLASSES, ignored=0.3):
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, tokens, size, dtype=dtype, requires_grad=True)
        self.linear = nn.Linear(size, classes, bias=bias, dtype=dtype)
        self.labels = torch.randint(0, classes, (rows, tokens)).masked_fill(torch.rand(rows, tokens) < ignored, IGNORED)
        self.head = Counted(self.linear)

    @property
    def leaves(self):
        return [self.hidden, *self.linear.parameters()]

    def lazy(self):
        return LazyLogits.of(self.hidden, self.head)

    def plain(self):
        return F.linear(self.hidden, self.linear.weight, self.linear.bias)

    def gradients(self, function, logits):
        value = function(logits)
        return value.detach(), *torch.autograd.grad(value, self.leaves)


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    monkeypatch.setattr(loss_module, "logit_rows", lambda classes: 16)


def assert_same(problem, function, fused, dtype=torch.float64):
    """`function` of lazy logits is what it is of plain ones, and so are its gradients; `fused`: without a logit made."""
    found = problem.gradients(function, problem.lazy())
    expected = problem.gradients(function, problem.plain())
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is torch.Tensor and ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= RELATIVE[dtype] * theirs.norm()
    assert (problem.head.made, problem.head.fused) == ((0, 1) if fused else (1, 0))


# -- losses that never make them


def test_a_constant_that_changes_after_it_was_added():
    """A prior of the classes that is updated between the call of the model and the loss: what counts is what it was."""
    problem, prior = Problem(), torch.linspace(-1, 1, CLASSES, dtype=torch.float64)

    def loss(logits, constant):
        shifted_logits = logits + constant
        constant.mul_(3)
        return F.cross_entropy(shifted_logits.view(-1, CLASSES), problem.labels.view(-1))

    assert_same(problem, lambda logits: loss(logits, prior.clone()), fused=True)


def alone(state, bucket):
    """In place of the sum over processes, where there is one."""
    found = torch.futures.Future()
    found.set_result(bucket.buffer())
    return found


class Given(nn.Module):
    """A model that returns logits on demand, and a tensor without gradient before them."""

    def __init__(self, problem):
        super().__init__()
        self.linear, self.head = problem.linear, problem.head

    def forward(self, hidden):
        return {"count": torch.ones(2), "state": hidden * 2, "logits": LazyLogits.of(hidden, self.head)}


@pytest.mark.parametrize(
    "settings, fused", [({"find_unused_parameters": True}, True), ({"static_graph": True}, False)], ids=["unused", "static"]
)
def test_a_loss_of_what_data_parallelism_hands_out(settings, fused):
    """It clones outputs where parameters may be unused. Of a static graph it begins its sums there, so no loss may go past it."""
    torch.distributed.init_process_group("fake", store=FakeStore(), world_size=1, rank=0)  # without threads, which would wait for Python
    try:
        problem = Problem()
        model = nn.parallel.DistributedDataParallel(Given(problem), **settings)
        model.register_comm_hook(None, alone)
        handed = model(problem.hidden)["logits"]
        assert type(handed.grad_fn).__name__ == "_DDPSinkBackward"
        F.cross_entropy(handed[:, :-1].reshape(-1, CLASSES), problem.labels[:, 1:].flatten(), label_smoothing=0.1).backward()
        found = [leaf.grad for leaf in problem.leaves]
        assert (problem.head.made, problem.head.fused) == ((0, 1) if fused else (1, 0))
    finally:
        torch.distributed.destroy_process_group()
    plain = F.cross_entropy(problem.plain()[:, :-1].reshape(-1, CLASSES), problem.labels[:, 1:].flatten(), label_smoothing=0.1)
    for ours, theirs in zip(found, torch.autograd.grad(plain, problem.leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def shifted(labels):
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


LOSSES = {
    "transformers": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), shifted(y).view(-1), ignore_index=-100, reduction="sum") / 7,
    "in double": lambda x, y: F.cross_entropy(x.double().view(-1, CLASSES), y.view(-1)),
    "sliced": lambda x, y: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, CLASSES), y[..., 1:].contiguous().view(-1)),
    "sliced in two": lambda x, y: F.cross_entropy(x[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1), reduction="sum"),
    "of a middle": lambda x, y: F.cross_entropy(x[:, 3:9, :].flatten(0, 1), y[:, 3:9].flatten()),
    "sliced twice": lambda x, y: F.cross_entropy(x[1:, 2:].clone()[:, 1::5].reshape(-1, CLASSES), y[1:, 3::5].flatten()),
    "of one row": lambda x, y: F.cross_entropy(x[1], y[1]),
    "of the last tokens": lambda x, y: F.cross_entropy(x[:, -1, :].contiguous(), y[:, -1].clamp_min(0)),
    "of flat rows": lambda x, y: F.cross_entropy(x.view(-1, CLASSES)[5:20], y.flatten()[5:20]),
    "narrowed": lambda x, y: F.cross_entropy(x.narrow(1, 2, 4).reshape(-1, CLASSES), y[:, 2:6].flatten()),
    "unflattened": lambda x, y: F.cross_entropy(x.flatten(0, 1).unflatten(0, (ROWS, TOKENS))[:, 1:].flatten(0, 1), y[:, 1:].flatten()),
    "smoothed": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.view(-1), label_smoothing=0.1),
    "smoothed sum": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.view(-1), reduction="sum", label_smoothing=0.1),
    "module": lambda x, y: nn.CrossEntropyLoss(ignore_index=-100)(x.view(-1, CLASSES), y.view(-1)),
    "pad as class": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.view(-1).clamp_min(0), ignore_index=0),
    "scaled": lambda x, y: F.cross_entropy((x * 3).view(-1, CLASSES), y.view(-1)),
    "scaled from the left": lambda x, y: F.cross_entropy((0.5 * x / 2.0).view(-1, CLASSES), y.view(-1), label_smoothing=0.1),
    "capped": lambda x, y: F.cross_entropy((torch.tanh(x / 0.7) * 0.7)[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1), reduction="sum"),
    "only tanh": lambda x, y: F.cross_entropy(x.tanh().view(-1, CLASSES), y.view(-1)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_are_those_of_plain_logits_without_making_any(loss, bias):
    problem = Problem(bias=bias)
    assert_same(problem, lambda logits: loss(logits, problem.labels), fused=True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_other_labels_is_noticed(loss):
    problem = Problem()
    found = problem.gradients(lambda x: loss(x, problem.labels), problem.lazy())
    wrong = problem.gradients(lambda x: loss(x, problem.labels.roll(1)), problem.plain())
    assert all((ours - theirs).norm() > NOTICED * theirs.norm() for ours, theirs in zip(found, wrong))


@pytest.mark.parametrize("loss", ["scaled", "capped", "only tanh"])
def test_a_pointwise_operation_left_out_would_be_noticed(loss, monkeypatch):
    problem = Problem()
    expected = problem.gradients(lambda x: LOSSES[loss](x, problem.labels), problem.plain())
    monkeypatch.setattr("hf_memtune.core.logits._Memory.pointwise", lambda memory: None)
    wrong = problem.gradients(lambda x: LOSSES[loss](x, problem.labels), problem.lazy())
    assert all((ours - theirs).norm() > NOTICED * theirs.norm() for ours, theirs in zip(wrong, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["transformers", "scaled", "capped", "sliced"])
def test_losses_in_lower_precision(loss, dtype):
    problem = Problem(dtype=dtype)
    assert_same(problem, lambda x: LOSSES[loss](x.float(), problem.labels), fused=True, dtype=dtype)


def test_the_dtype_of_the_loss_is_that_of_the_plain_one():
    problem = Problem(dtype=torch.bfloat16)
    for cast in (torch.bfloat16, torch.float32, torch.float64, torch.float16):
        lazy, plain = (F.cross_entropy(x.to(cast).view(-1, CLASSES), problem.labels.view(-1)) for x in (problem.lazy(), problem.plain()))
        assert lazy.dtype == plain.dtype == cast
    assert problem.head.made == 0


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_hidden_states_of_any_leading_dimensions(shape):
    problem = Problem()
    problem.hidden = torch.randn(*shape, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, CLASSES, (shape or (1,))).flatten()
    assert_same(problem, lambda x: F.cross_entropy(x.reshape(-1, CLASSES), labels), fused=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("above", [1.0, float("inf"), float("nan")])
def test_a_batch_without_labels(reduction, above):
    problem, nothing = Problem(), torch.full((ROWS * TOKENS,), IGNORED)

    def loss(logits):
        return above * F.cross_entropy(logits.view(-1, CLASSES), nothing, reduction=reduction)

    found, expected = (problem.gradients(loss, logits) for logits in (problem.lazy(), problem.plain()))
    assert torch.equal(found[0].isnan(), expected[0].isnan()) and (reduction == "sum" or found[0].isnan())
    assert all((gradient == 0).all() for gradient in (*found[1:], *expected[1:]))


def test_no_rows_at_all():
    problem = Problem(tokens=1)
    value = F.cross_entropy(problem.lazy()[:, 1:].reshape(-1, CLASSES), problem.labels[:, 1:].reshape(-1), reduction="sum")
    value.backward()
    assert value == 0 and all((leaf.grad == 0).all() for leaf in problem.leaves)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_raise_as_they_do_in_torch(label):
    problem = Problem()
    for logits in (problem.lazy(), problem.plain()):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            F.cross_entropy(logits.view(-1, CLASSES), torch.full((ROWS * TOKENS,), label))


def test_without_gradient_no_gradient_is_made():
    problem = Problem()
    with torch.no_grad():
        loss = F.cross_entropy(problem.lazy().view(-1, CLASSES), problem.labels.view(-1))
        expected = F.cross_entropy(problem.plain().view(-1, CLASSES), problem.labels.view(-1))
    torch.testing.assert_close(loss, expected, **EXACT)
    assert not loss.requires_grad and problem.head.made == 0


def test_a_frozen_head_has_no_gradient():
    problem = Problem()
    problem.linear.requires_grad_(False)
    loss = F.cross_entropy(problem.lazy().view(-1, CLASSES), problem.labels.view(-1))
    loss.backward()
    assert problem.hidden.grad is not None and problem.linear.weight.grad is None


def test_a_trained_head_on_frozen_hidden_states():
    problem = Problem()
    problem.hidden.requires_grad_(False)
    loss, expected = (F.cross_entropy(x.view(-1, CLASSES), problem.labels.view(-1)) for x in (problem.lazy(), problem.plain()))
    for ours, theirs in zip(*(torch.autograd.grad(value, list(problem.linear.parameters())) for value in (loss, expected))):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_differentiating_the_loss_twice_raises():
    problem = Problem()
    loss = F.cross_entropy(problem.lazy().view(-1, CLASSES), problem.labels.view(-1))
    with pytest.raises(LogitsError, match="once only"):
        torch.autograd.grad(loss, [problem.hidden], create_graph=True)


# -- what needs the values


class Squares(torch.autograd.Function):
    """A user's own loss, which nothing told of lazy tensors."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.pow(2).sum()

    @staticmethod
    def backward(ctx, upstream):
        (logits,) = ctx.saved_tensors
        return 2 * upstream * logits


class Sink(torch.autograd.Function):
    """As DistributedDataParallel does with outputs."""

    @staticmethod
    def forward(ctx, *inputs):
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx, *upstreams):
        return tuple(3 * upstream for upstream in upstreams)


def in_place(logits):
    logits = logits * 1.0
    logits.div_(3)
    logits[:, 0] = 0
    logits[0].mul_(2)
    return logits.exp().sum()


def in_place_then_loss(logits, labels):
    logits.div_(2)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def view_then_in_place(logits, labels):
    part = logits[:, 2:]
    part.mul_(2)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)) + part.pow(2).sum()


def copy_then_in_place(logits, labels):
    copied, sliced = logits.clone(), logits[:, 1:] * 2
    logits.zero_()
    return copied.exp().sum() + sliced.sin().sum() + logits.sum()


def sink_then_loss(logits, labels):
    (logits,) = Sink.apply(logits)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def weighted(logits, labels):
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1), weight=torch.arange(CLASSES, dtype=torch.float64))


PLAIN = {
    "square": lambda x, y: x.pow(2).sum(),
    "log softmax": lambda x, y: F.nll_loss(F.log_softmax(x.view(-1, CLASSES), -1), y.view(-1)),
    "each token": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.view(-1), reduction="none").pow(2).sum(),
    "classes first": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "class weights": weighted,
    "probabilities": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), torch.ones(ROWS * TOKENS, CLASSES).double() / CLASSES),
    "below dispatch": lambda x, y: Squares.apply(x),
    "below dispatch, cast": lambda x, y: Squares.apply(x.float().double()[:, 1:] * 2),
    "tanh alone": lambda x, y: torch.tanh(x / 3).sum(),
    "half of the classes": lambda x, y: x[..., ::2].exp().sum(),
    "chosen": lambda x, y: x.gather(-1, y.clamp_min(0)[..., None]).sum() + x[y > 3].sum(),
    "stacked": lambda x, y: torch.cat([x, x[:1]]).exp().sum(),
    "in place": lambda x, y: in_place(x),
    "in place, loss": in_place_then_loss,
    "a view in place": view_then_in_place,
    "copied before": copy_then_in_place,
    "through a sink": sink_then_loss,
    "entropy": lambda x, y: -(x.softmax(-1) * x.log_softmax(-1)).sum(),
    "set": lambda x, y: x.index_fill(1, torch.tensor([2]), 0.5).cos().sum(),
    "matrix product": lambda x, y: (x @ torch.ones(CLASSES, 2).double()).sin().sum(),
}


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN)
def test_everything_else_is_what_it_is_of_plain_logits(function):
    problem = Problem()
    found = problem.gradients(lambda x: function(x, problem.labels), problem.lazy())
    expected = problem.gradients(lambda x: function(x, problem.labels), problem.plain())
    is_cast = function is PLAIN["below dispatch, cast"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **close(torch.float32 if is_cast else torch.float64))
    assert problem.head.fused == 0 and problem.head.made >= 1


def test_a_way_to_the_gradient_that_is_lost_would_be_noticed(monkeypatch):
    """The sibling: the same comparison fails where the logits' own backward does nothing."""
    from hf_memtune.core import logits as module

    monkeypatch.setattr(module._Logits, "backward", lambda ctx, upstream: (None,) * 4)
    problem = Problem()
    with pytest.raises(RuntimeError, match="not have been used"):
        problem.gradients(lambda x: Squares.apply(x), problem.lazy())


def test_both_ways_at_once():
    problem = Problem()

    def loss(logits):
        flat = logits.view(-1, CLASSES)
        return F.cross_entropy(flat, problem.labels.view(-1)) + 1e-2 * flat.logsumexp(-1).pow(2).mean()

    found, expected = (problem.gradients(loss, logits) for logits in (problem.lazy(), problem.plain()))
    torch.testing.assert_close(found, expected, **EXACT)
    assert (problem.head.made, problem.head.fused) == (1, 1)


def test_values_are_made_once():
    problem = Problem()
    logits = problem.lazy()
    assert torch.equal(logits.argmax(-1), problem.plain().argmax(-1))
    assert torch.equal(logits[0, 1], problem.plain()[0, 1]) and problem.head.made == 1
    F.cross_entropy(logits.view(-1, CLASSES), problem.labels.view(-1)).backward()
    assert (problem.head.made, problem.head.fused) == (1, 1)  # what was looked at before does not change how a loss is taken


def test_metadata_makes_nothing():
    problem = Problem()
    logits, plain = problem.lazy(), problem.plain()
    for x in (logits, logits.float(), logits[:, 1:]):
        assert isinstance(x, torch.Tensor) and isinstance(x, LazyLogits)
    for read in (
        lambda x: x.shape, lambda x: x.size(), lambda x: x.dtype, lambda x: x.device, lambda x: x.stride(), lambda x: x.numel(),
        lambda x: x.dim(), lambda x: len(x), lambda x: x.requires_grad, lambda x: x.is_contiguous(), lambda x: x[:, 1:].stride(),
        lambda x: x[:, 1:].shape, lambda x: x[1:, ::2].contiguous().stride(), lambda x: x.is_leaf, lambda x: x.ndim, lambda x: x.nbytes,
        lambda x: x[..., -1, :].shape, lambda x: x.float().dtype, lambda x: x.type(), lambda x: x.is_floating_point(),
        lambda x: repr(x.shape), lambda x: x.view(-1, CLASSES).shape, lambda x: x.to("cpu").shape,
        lambda x: x.is_cuda, lambda x: x.layout, lambda x: x.detach().requires_grad, lambda x: torch.is_tensor(x),
    ):  # fmt: skip
        assert read(logits) == read(plain)
    assert len({logits, logits}) == 1 and problem.head.made == 0
    assert logits.sum() == plain.sum() and problem.head.made == 1  # the count does tell


READINGS = {
    "numpy": lambda x: x.detach().numpy().sum(),
    "list": lambda x: x.tolist(),
    "item": lambda x: x[0, 0, 0].item(),
    "float": lambda x: float(x[1, 2, 3].detach()),
    "copy": lambda x: copy.deepcopy(x.detach()).tolist(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())).tolist(),
    "save": lambda x: saved_and_loaded(x).tolist(),
    "rows": lambda x: [row.tolist() for row in x],
    "numbers": lambda x: str(x.detach()),
    "bytes": lambda x: x.untyped_storage().nbytes(),
    "in": lambda x: 0.25 in x,
    "numpy's": lambda x: __import__("numpy").asarray(x.detach()).tolist(),
    "a slice": lambda x: x[1:, 2:5].tolist(),
    "a flat slice": lambda x: x.flatten(0, 1)[3:7:2].float().tolist(),
    "shares": lambda x: x.detach()[1:].add_(1).sum().item() + x.sum().item(),
    "data": lambda x: x.data.mul_(2).sum().item() + x.sum().item(),
}


def saved_and_loaded(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_readings_are_those_of_plain_logits(reading):
    problem = Problem()
    assert reading(problem.lazy()) == reading(problem.plain())
    tells_values = reading not in (READINGS["bytes"], READINGS["in"])
    assert (reading(problem.plain() + 0.1) != reading(problem.plain())) == tells_values


def test_a_copy_of_what_is_no_leaf_raises_as_plain():
    for logits in (Problem().lazy(), Problem().plain()):
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(logits)


def test_a_leaf_of_its_own_has_its_own_gradient():
    problem = Problem()
    leaves = [logits.detach().requires_grad_() for logits in (problem.lazy(), problem.plain())]
    for leaf in leaves:
        F.cross_entropy(leaf.view(-1, CLASSES), problem.labels.view(-1)).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)
    assert problem.hidden.grad is None and copy.deepcopy(leaves[0]).requires_grad


def test_gradients_of_the_logits_themselves():
    problem = Problem()
    found = []
    for logits in (problem.lazy(), problem.plain()):
        logits.retain_grad()
        seen = []
        cast = logits.float().double()
        cast.register_hook(seen.append)
        F.cross_entropy(cast.view(-1, CLASSES), problem.labels.view(-1)).backward()
        found.append((logits.grad, seen[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert problem.head.fused == 0


@pytest.mark.parametrize("ask", [lambda x: x.retain_grad(), lambda x: x.register_hook(print)], ids=["retained", "hook"])
def test_a_gradient_asked_for_too_late_raises(ask):
    problem = Problem()
    logits = problem.lazy()
    loss = F.cross_entropy(logits.view(-1, CLASSES), problem.labels.view(-1))
    with pytest.raises(LogitsError, match="already"):
        ask(logits)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss, [logits])


def test_a_gradient_of_what_was_made_is_there():
    problem = Problem()
    gradients = [torch.autograd.grad(x.exp().sum(), [x])[0] for x in (problem.lazy(), problem.plain())]
    torch.testing.assert_close(*gradients, **EXACT)


def test_differentiable_twice_where_made():
    problem, found = Problem(), []
    for logits in (problem.lazy(), problem.plain()):
        first = torch.autograd.grad(logits.pow(3).sum(), [problem.hidden], create_graph=True)[0]
        found.append(torch.autograd.grad(first.pow(2).sum(), problem.leaves[:2]))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("change", ["weight", "hidden"])
def test_values_that_can_no_longer_be_made_raise(change):
    problem = Problem()
    logits, made = problem.lazy(), problem.lazy()
    before = made.sum().item()
    with torch.no_grad():
        (problem.linear.weight if change == "weight" else problem.hidden).add_(1)
    with pytest.raises(LogitsError, match="changed in place"):
        logits.sum()
    with pytest.raises(LogitsError, match="changed in place"):
        F.cross_entropy(logits.view(-1, CLASSES), problem.labels.view(-1))
    assert made.sum().item() == before == made.double().sum().item()


REPLACEMENTS = {
    "set": lambda x: x.detach().set_(torch.ones(1, dtype=x.dtype)),
    "resize": lambda x: x.detach().resize_(1),
    "data": lambda x: setattr(x, "data", torch.ones(1, dtype=x.dtype)),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_memory_is_not_replaced(replace):
    with pytest.raises(LogitsError, match="replace"):
        replace(Problem().lazy())


def test_ways_in_that_torch_hides_from_subclasses():
    problem, found = Problem(), []
    for logits in (problem.lazy(), problem.plain()):
        free = logits.detach()
        copied = torch.empty(logits.shape, dtype=logits.dtype).copy_(free)
        read = [copied, torch.asarray(free), torch.as_tensor(free), nn.Parameter(free), torch.from_dlpack(free), logits.new_zeros(2)]
        found.append([x.tolist() for x in read])
    assert found[0] == found[1]


def test_a_head_that_does_more_is_told():
    problem = Problem()
    logits = LazyLogits.of(problem.hidden, HeadOnDemand(lambda hidden: hidden, lambda: problem.linear.weight))
    with pytest.raises(LogitsError, match="does more"):
        logits.sum()


def test_the_weight_is_asked_for_once():
    problem, asked = Problem(), []
    head = HeadOnDemand(problem.head.forward, lambda: asked.append(1) or problem.linear.weight, problem.linear.bias)
    logits = LazyLogits.of(problem.hidden, head)
    (F.cross_entropy(logits.view(-1, CLASSES), problem.labels.view(-1)) + logits.exp().sum()).backward()
    assert asked == [1]


# -- modes and states


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("function", ["transformers", "capped", "square"])
def test_autocast_is_that_of_the_call(function, inside):
    function, problem = (LOSSES | PLAIN)[function], Problem(dtype=torch.float32)
    found, half = [], torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside)
    for make in (problem.lazy, problem.plain):
        with half:
            logits = make()
        assert logits.dtype == (torch.bfloat16 if inside else torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            found.append((logits, *problem.gradients(lambda x: function(x, problem.labels), logits)))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= RELATIVE[torch.bfloat16] * theirs.norm()


def test_below_dispatch_autocast_is_that_of_the_call_too():
    problem = Problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, plain = problem.lazy(), problem.plain()
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(logits.matmul(torch.ones(CLASSES, 2)), plain.matmul(torch.ones(CLASSES, 2)))


def test_inference_mode():
    problem = Problem()
    with torch.inference_mode():
        logits, plain = problem.lazy(), problem.plain()
        losses = [F.cross_entropy(x.float().view(-1, CLASSES), problem.labels.view(-1)) for x in (logits, plain)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        assert problem.head.made == 0
        torch.testing.assert_close(logits[:, 1:].argmax(-1), plain[:, 1:].argmax(-1))
        logits.mul_(2)
        torch.testing.assert_close(logits.sum(), 2 * plain.sum(), **EXACT)
        losses = [F.cross_entropy(x.view(-1, CLASSES), problem.labels.view(-1)) for x in (logits, 2 * plain)]
        torch.testing.assert_close(losses[0], losses[1], **EXACT)


def test_values_first_read_in_inference_mode_can_be_learned_from():
    problem = Problem()
    logits = problem.lazy()
    with torch.inference_mode():
        logits.sum()
    found, expected = (problem.gradients(lambda x: x.exp().sum(), x) for x in (logits, problem.plain()))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("loss", ["transformers", "capped"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(loss, reentrant):
    problem, found = Problem(), []
    for make in (problem.lazy, problem.plain):
        value = checkpoint(lambda hidden: LOSSES[loss](make(), problem.labels), problem.hidden, use_reentrant=reentrant)
        if not reentrant:
            found.append((value, *torch.autograd.grad(value, problem.leaves)))
            continue
        value.backward()
        found.append((value, *(leaf.grad.clone() for leaf in problem.leaves[1:])))
        problem.linear.zero_grad()
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: torch.tanh(x * 2)], ids=["casts", "capped"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_traced_without_values(reduction, make):
    with FakeTensorMode():
        problem = Problem(ignored=0)
        logits = make(problem.lazy()).float()
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES), problem.labels[:, 1:].reshape(-1), reduction=reduction)
        loss.backward()
        assert loss.dtype == torch.float32 and problem.head.made == 0
        assert all(leaf.grad.shape == leaf.shape for leaf in problem.leaves)
        assert problem.lazy().exp().sum().shape == () and problem.head.made == 1


# -- memory


def big():
    return Problem(dtype=torch.float32, tokens=512, rows=2, classes=512, bias=False)


ALL_BYTES = 2 * 512 * 512 * 4
STEPS = {
    "casts": lambda x, y: F.cross_entropy(x.float()[:, :-1].reshape(-1, 512), y[:, 1:].reshape(-1)),
    "capped": lambda x, y: F.cross_entropy(torch.tanh(x / 3).mul(3).view(-1, 512), y.view(-1), reduction="sum"),
}


def made_before(function):
    def step(logits, labels):
        logits.argmax(-1)
        return function(logits, labels)

    return step


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ledger", [LiveBytes, StepLedger])
def test_logits_never_exist_all_at_once(step, ledger):
    fake, step = (step == "casts") == (ledger is StepLedger), STEPS[step]

    def peak(step):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
            problem = big()
            with ledger() if ledger is LiveBytes else ledger(problem.linear) as live:
                step(problem.lazy(), problem.labels).backward()
        return live.peak_bytes

    assert peak(step) < ALL_BYTES / 4
    assert peak(made_before(step)) >= ALL_BYTES  # the sibling


def test_a_wrapper_counts_no_bytes():
    problem = big()
    with LiveBytes() as live:
        logits = problem.lazy()
        kept = [logits.double(), logits[:, 1:], logits * 3, logits.detach(), logits.clone().view(-1, 512).tanh()]
    assert live.peak_bytes == 0 and len(kept) == 5
    with LiveBytes() as live:
        logits.sum()
    assert live.current_bytes >= ALL_BYTES  # kept, for it may be read again


def test_autograd_saves_no_logits():
    problem = big()
    with SavedBytes(exclude=problem.linear) as saved:
        loss = STEPS["capped"](problem.lazy(), problem.labels)
    assert loss.requires_grad and saved.total_bytes < ALL_BYTES / 16 and problem.head.made == 0


def test_one_gradient_of_a_capped_head():
    problem = Problem(dtype=torch.float32, tokens=4, rows=1, classes=4096, bias=False)
    loss = F.cross_entropy((problem.lazy() * 2).view(-1, 4096), problem.labels.view(-1))
    with LiveBytes() as live:
        loss.backward()
    assert live.peak_bytes < problem.linear.weight.nbytes / 10  # it was made in forward


@pytest.mark.parametrize("leaking", [False, True])
@pytest.mark.parametrize("function", [LOSSES["transformers"], LOSSES["capped"], PLAIN["tanh alone"], PLAIN["in place"]])
def test_what_logits_hold_goes_with_them(function, leaking):
    """Without the garbage collector: no logits, hidden states or values hold themselves."""
    problem = Problem()
    gc.collect()
    gc.disable()
    try:
        hidden = problem.hidden * 1
        logits = LazyLogits.of(hidden, problem.head)
        dead = [weakref.ref(hidden.untyped_storage()), weakref.ref(logits)]
        function(logits, problem.labels).backward()
        logits.detach().sum()
        kept = [logits] if leaking else []
        del hidden, logits
        assert [ref() is None for ref in dead] == [not leaking] * 2, kept
    finally:
        gc.enable()
