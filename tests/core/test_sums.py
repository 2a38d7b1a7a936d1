"""Sums over parts of a backward pass: handed to autograd when they are whole, and never held twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_memtune.core.sums import GradientSums
from hf_memtune.memory import LiveBytes
from tests.support.parts import in_parts
from tests.support.tolerances import NOTICED, close

ROWS, SIZE = 6, 5


class Tied(nn.Module):
    """One matrix in two modules, used one after the other, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = (nn.Linear(SIZE, SIZE, dtype=torch.float64) for _ in range(3))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.second(self.frozen(self.first(x).tanh()).tanh())


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Tied()


def rows(seed=1):
    return torch.randn(ROWS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def loss_of(output):
    return output.square().sum()


def plain_gradients(module, x=None):
    x = rows() if x is None else x
    return torch.autograd.grad(loss_of(module(x)), trained(module))


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, **close(torch.float64))


# -- the gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, ROWS])
def test_the_sum_is_the_gradient(module, parts):
    expected, x, y = plain_gradients(module), rows(), rows()
    loss_of(in_parts(module, x, parts)).backward()
    loss_of(module(y.requires_grad_())).backward(inputs=[y])
    assert_close([*(p.grad for p in trained(module)), x.grad], [*expected, y.grad])
    assert (trained(module)[0].grad - plain_gradients(module, rows(2))[0]).norm() > NOTICED * expected[0].norm()
    assert all(p.grad is None for p in module.frozen.parameters())


def test_it_is_added_in_place_to_the_gradient_that_is_there(module):
    expected = plain_gradients(module)
    for p in trained(module):
        p.grad = torch.full_like(p, 0.5)
    before = [p.grad for p in trained(module)]
    loss_of(in_parts(module, rows())).backward()
    assert all(p.grad is there for p, there in zip(trained(module), before))
    assert_close(before, [gradient + 0.5 for gradient in expected])


def test_two_calls_in_one_backward_pass(module):
    expected = [a + b for a, b in zip(plain_gradients(module), plain_gradients(module, rows(2)))]
    for there in (0, 1):
        for p in trained(module):
            p.grad = torch.ones_like(p) if there else None
        (loss_of(in_parts(module, rows())) + loss_of(in_parts(module, rows(2)))).backward()
        assert_close([p.grad - there for p in trained(module)], expected)


def test_a_parameter_that_is_used_outside_too(module):
    """Its other gradient comes to the same node, before or after."""
    for there in (0, 1):
        for p in trained(module):
            p.grad = torch.ones_like(p) if there else None
        weight = module.first.weight
        (loss_of(in_parts(module, rows())) + weight.square().sum()).backward()
        assert_close([weight.grad - there], [plain_gradients(module)[0] + 2 * weight])


@pytest.mark.parametrize("gradient", ["sparse", "with a graph", "of another dtype"])
def test_a_gradient_that_is_no_plain_tensor_is_left_to_autograd(module, gradient):
    weight = module.first.weight
    there = torch.ones_like(weight)
    if gradient == "of another dtype":
        if not hasattr(weight, "grad_dtype"):
            pytest.skip("this torch has no gradients of another dtype")
        weight.grad_dtype = torch.float32
        there = there.float()
    weight.grad = {"sparse": there.to_sparse(), "with a graph": there * weight}.get(gradient, there)
    before = weight.grad.to_dense().detach().clone()
    expected = plain_gradients(module)[0]
    loss_of(in_parts(module, rows())).backward()
    torch.testing.assert_close(weight.grad.to_dense().double().detach(), (before + expected).double(), **close(torch.float32))


# -- who else looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_hooks_fire_once_with_the_whole_gradient(module, there):
    """That of the tensor sees what is added, that after accumulation the sum with what was there."""
    expected = plain_gradients(module)[0]
    weight = module.first.weight
    weight.grad = torch.ones_like(weight) if there else None
    added, accumulated = [], []
    weight.register_hook(lambda gradient: added.append(gradient.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    loss_of(in_parts(module, rows())).backward()
    assert_close(added, [expected])
    assert_close(accumulated, [expected + there])


@pytest.mark.parametrize("there", [False, True])
def test_a_hook_on_the_parameter_may_change_the_gradient(module, there):
    expected, weight = plain_gradients(module)[0], module.first.weight
    weight.grad = torch.ones_like(weight) if there else None
    weight.register_hook(lambda gradient: 3 * gradient)
    loss_of(in_parts(module, rows())).backward()
    assert_close([weight.grad], [3 * expected + there])


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_hook_on_the_node_of_a_parameter_sees_what_is_added(module, kind, there):
    """And may change it, before it is accumulated."""
    expected, weight, seen = plain_gradients(module)[0], module.first.weight, []
    weight.grad = torch.ones_like(weight) if there else None
    node = torch.autograd.graph.get_gradient_edge(weight).node
    if kind == "before":
        node.register_prehook(lambda gradients: (seen.append(gradients[0].clone()), (3 * gradients[0],))[1])
    else:
        node.register_hook(lambda inputs, gradients: seen.append(gradients[0].clone()))
    loss_of(in_parts(module, rows())).backward()
    assert_close([*seen, weight.grad], [expected, (3 if kind == "before" else 1) * expected + there])


def test_a_parameter_that_is_frozen_after_the_call_learns_nothing(module):
    weight, other = trained(module)[:2]
    expected = plain_gradients(module)[1]
    weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
    loss = loss_of(in_parts(module, rows()))
    weight.requires_grad_(False)
    loss.backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert_close([other.grad], [expected + 1])


def test_torch_autograd_grad_writes_to_no_gradient(module):
    expected = plain_gradients(module)
    for p in trained(module):
        p.grad = torch.ones_like(p)
    assert_close(torch.autograd.grad(loss_of(in_parts(module, rows())), trained(module)), expected)
    (alone,) = torch.autograd.grad(loss_of(in_parts(module, rows())), trained(module)[1:2])
    assert_close([alone], expected[1:2])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained(module))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_backward_of_one_parameter_writes_to_that_alone(module, which):
    expected, one = plain_gradients(module), trained(module)[which]
    for p in trained(module):
        p.grad = torch.ones_like(p)
    loss_of(in_parts(module, rows())).backward(inputs=[one])
    assert_close([one.grad], [expected[which] + 1])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained(module) if p is not one)


# -- standing in ---------------------------------------------------------------------------------------------------------


def test_aliases_stand_in_wherever_a_parameter_stands(module):
    sums, parameters = GradientSums(module), dict(module.named_parameters(remove_duplicate=False))
    assert len(sums.parameters) == len(trained(module)) == 3
    with pytest.raises(ZeroDivisionError), sums.standing_in():
        assert module.first.weight is module.second.weight is sums.alias(parameters["first.weight"])
        assert module.first.weight.data_ptr() == parameters["first.weight"].data_ptr()
        assert module.frozen.weight is parameters["frozen.weight"]
        1 / 0  # noqa: B018
    assert all(p is parameters[name] for name, p in module.named_parameters(remove_duplicate=False))


def test_what_was_there_on_entry_is_put_back(module):
    """Between the call and its backward, others may have been put in: these stay, and parts run on what the call had."""
    module.register_buffer("scale", torch.ones(2, dtype=torch.float64))
    called = {**dict(module.named_parameters()), "scale": module.scale}
    sums = GradientSums(module)
    for layer in (module.first, module.second, module.frozen):
        layer.weight, layer.bias = (nn.Parameter(2 * p) for p in (layer.weight, layer.bias))
    module.scale = 2 * module.scale
    then = {**dict(module.named_parameters(remove_duplicate=False)), "scale": module.scale}
    with sums.standing_in():
        assert module.first.weight is module.second.weight is sums.alias(called["first.weight"])
        assert module.frozen.weight is called["frozen.weight"] and module.scale is called["scale"]
    with sums.as_called():
        assert module.first.weight is called["first.weight"] and module.scale is called["scale"]
    assert all(p is then[name] for name, p in module.named_parameters(remove_duplicate=False)) and module.scale is then["scale"]


def test_what_somebody_puts_in_while_parts_run_stays(module):
    """Offloading puts in weights before a module runs, and takes them out."""
    sums, weight = GradientSums(module), nn.Parameter(torch.ones(SIZE, SIZE))
    with sums.standing_in():
        module.first.weight = weight
        del module.second.bias
    assert module.first.weight is weight and "bias" not in module.second._parameters


def test_what_was_found_elsewhere_is_added(module):
    weight = module.first.weight
    for given in (torch.ones_like(weight), torch.ones((), dtype=weight.dtype).expand_as(weight)):
        sums = GradientSums(module)
        for _ in range(2):
            sums.add(weight, given.clone() if given.stride(0) else given)
        with torch.enable_grad(), sums.standing_in():
            loss_of(module(rows().detach())).backward()
        assert_close(sums.take()[:1], [plain_gradients(module)[0] + 2])
        assert torch.equal(given, torch.ones_like(weight))  # one that is expanded is nobody's to write into


# -- bytes ---------------------------------------------------------------------------------------------------------------

MATRIX = 1000 * 8 * 4


def peak(there, hooked=None):
    """What backward makes at most: of a matrix of 1000 rows, of which every part needs a gradient of the whole size."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 1000, bias=False)
    linear.weight.grad = torch.zeros_like(linear.weight) if there else None
    node = torch.autograd.graph.get_gradient_edge(linear.weight).node
    if hooked is not None:
        {"tensor": linear.weight.register_hook, "node": node.register_prehook}[hooked](lambda gradient: None)
    loss = in_parts(linear, torch.randn(3, 8)).sum()
    with LiveBytes() as live:
        loss.backward()
    return live.peak_bytes, live.current_bytes


def test_the_sum_is_never_held_twice():
    """Where a gradient is there, what one part makes is all that is made; else the sum beside it. One more is noticed."""
    rest = 1000 * 4 + 4  # what a part computes, and the gradient of the loss
    assert peak(there=True) == (MATRIX + rest, 0)
    assert peak(there=False) == (2 * MATRIX + rest, MATRIX)
    assert peak(there=True, hooked="tensor") == peak(there=True, hooked="node") == (2 * MATRIX + rest, 0)


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_two_calls_in_one_backward_pass_hold_no_more(is_waited_for):
    """Unless a hook waits for the accumulation of each parameter: autograd adds what both calls hand to it."""
    torch.manual_seed(0)
    stack, accumulated = nn.Sequential(*(nn.Linear(*size, bias=False) for size in ((8, 1000), (1000, 8)) * 2)), []
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
        if is_waited_for:
            p.register_post_accumulate_grad_hook(accumulated.append)
    loss = in_parts(stack, torch.randn(3, 8)).sum() + in_parts(stack, torch.randn(3, 8)).sum()
    with LiveBytes() as live:
        loss.backward()
    assert live.current_bytes == 0 and len(accumulated) == 4 * is_waited_for
    assert (MATRIX <= live.peak_bytes < 2 * MATRIX) if not is_waited_for else live.peak_bytes > 3 * MATRIX


def test_plain_training_holds_as_many():
    """What is compared with: autograd adds a whole gradient to the one that is there."""
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 1000, bias=False), torch.randn(3, 8)
    linear.weight.grad = torch.zeros_like(linear.weight)
    loss = F.linear(x, linear.weight).square().sum()
    with LiveBytes() as live:
        loss.backward()
    assert live.peak_bytes >= MATRIX
