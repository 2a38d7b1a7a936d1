"""One node of autograd that runs its part of the model again: what goes in, what comes out, and what is left."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_memtune.core.replay import replayed
from hf_memtune.errors import MemTuneError
from tests.support.parts import Parts, in_parts
from tests.support.tolerances import NOTICED, close


class Twice:
    """y = 2 x, z = 3 x, and where x is positive; it notes the gradients that come."""

    def __init__(self, x):
        self.inputs, self.given = [x], []
        self._outputs = [2 * x.detach(), 3 * x.detach(), x.detach() > 0]

    def take_outputs(self):
        taken, self._outputs = self._outputs, []
        return taken

    def backward(self, cotangents, nodes):
        self.given.append(cotangents)
        assert [node.variable is x for node, x in zip(nodes, self.inputs, strict=True)] == [True]
        return [sum(factor * c for factor, c in zip((2, 3), cotangents) if c is not None)]


def vector(requires_grad=True):
    return torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=requires_grad)


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)


# -- what goes through ---------------------------------------------------------------------------------------------------


def test_each_output_has_its_gradient_and_none_is_none():
    for use, expected, missing in (
        (lambda y, z: y.sum() + z.sum(), 5, (False, False)),
        (lambda y, z: y.sum(), 2, (False, True)),
        (lambda y, z: z.sum(), 3, (True, False)),
    ):
        x = vector()
        y, z, positive = replayed(run := Twice(x))
        assert positive.tolist() == [True, False] and not positive.requires_grad
        use(y, z).backward()
        assert x.grad.tolist() == [expected] * 2
        assert tuple(c is None for c in run.given[0][:2]) == missing and len(run.given) == 1


def test_a_loss_that_reads_no_output_replays_nothing():
    x = vector()
    y, _, _ = replayed(run := Twice(x))
    (0 * x.sum() + y.detach().sum()).backward()
    assert not run.given and x.grad.tolist() == [0, 0]


def test_without_inputs_that_require_grad_outputs_do_not():
    assert not any(output.requires_grad for output in replayed(Twice(vector(False))))


def test_any_loss_of_several_calls_together():
    module, x = linear()
    loss = lambda call: (call(x)[:3] * call(x.flip(0))[3:]).logsumexp(1).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(module), [x, *module.parameters()])
    found = torch.autograd.grad(loss(lambda rows: in_parts(module, rows)), [x, *module.parameters()])
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, **close(torch.float64))
    wrong = torch.autograd.grad(in_parts(module, x).logsumexp(1).sum(), x)[0]
    assert (wrong - expected[0]).norm() > NOTICED * expected[0].norm()


def test_what_is_not_a_leaf_goes_on_backward():
    module, x = linear()
    outer = torch.full_like(x, 2.0, requires_grad=True)
    (found,) = torch.autograd.grad(in_parts(module, x * outer).square().sum(), outer)
    (expected,) = torch.autograd.grad(module(x * outer).square().sum(), outer)
    torch.testing.assert_close(found, expected, **close(torch.float64))


# -- once ----------------------------------------------------------------------------------------------------------------


def test_a_second_backward_is_refused():
    module, x = linear()
    loss = in_parts(module, x).square().sum()
    loss.backward(retain_graph=True)
    before = x.grad.clone()
    with pytest.raises(MemTuneError, match="a second time.*Call the model again"):
        loss.backward()
    assert torch.equal(x.grad, before)


def test_two_losses_of_one_call_go_backward_together_or_not_at_all():
    module, x = linear()
    output = in_parts(module, x)
    (expected,) = torch.autograd.grad(module(x).sum() + module(x).square().sum(), x)
    (found,) = torch.autograd.grad(output.sum() + output.square().sum(), x)
    torch.testing.assert_close(found, expected, **close(torch.float64))
    output = in_parts(module, x)
    output.sum().backward(retain_graph=True)
    with pytest.raises(MemTuneError, match="a second time"):
        output.square().sum().backward()


@pytest.mark.parametrize("there", [False, True])
def test_gradients_of_gradients_are_refused(there):
    """With create_graph, as a gradient penalty has it: an error, not a penalty that is not learned."""
    module, x = linear()
    module.weight.grad = torch.zeros_like(module.weight) if there else None
    (gradient,) = torch.autograd.grad(in_parts(module, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()
    in_parts(module, x).square().sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        module.weight.grad.square().sum().backward()


def test_an_error_in_backward_is_the_users_to_see():
    class Failing(Twice):
        def backward(self, cotangents, nodes):
            raise torch.OutOfMemoryError("no memory")

    y, _, _ = replayed(Failing(vector()))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        y.sum().backward()


# -- nothing is left -----------------------------------------------------------------------------------------------------


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_outputs_that_are_dropped_leave_nothing(uncollected):
    module, x = linear()
    outputs = replayed(run := Parts(module, x))
    noted = [weakref.ref(run), weakref.ref(outputs[0].untyped_storage())]
    del run
    assert all(reference() is not None for reference in noted)
    del outputs
    assert not any(reference() for reference in noted)
    assert x.grad is None and all(p.grad is None for p in module.parameters())


def test_outputs_live_no_longer_than_who_uses_them(uncollected):
    module, x = linear()
    outputs = replayed(Parts(module, x))
    noted = weakref.ref(outputs[0].untyped_storage())
    loss = outputs[0].sum()  # which saves nothing
    del outputs
    assert noted() is None and loss.requires_grad


def test_what_went_backward_is_gone_while_its_loss_is_there(uncollected):
    module, x = linear()
    (output,) = replayed(run := Parts(module, x))
    noted, loss = weakref.ref(run), output.square().sum()
    del run, output
    assert noted() is not None
    loss.backward(retain_graph=True)
    assert noted() is None
