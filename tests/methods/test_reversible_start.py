"""What `verify` says before the first step, and how near the start is to the pre-trained model."""

import pytest
import torch

from hf_memtune import ReversibleConfig
from hf_memtune.methods.reversible.handle import make_reversible
from tests.support.reversible_models import inputs_of, model_of, reversible_of
from tests.support.reversible_removal import same_state, state_of


def test_a_verified_model_learns_nothing_and_draws_nothing():
    model = model_of("bert", dropout=0.1)
    batch = inputs_of("bert", model)
    handle = reversible_of(model, "centred", "exact")
    torch.manual_seed(3)
    before, state = state_of(model), torch.get_rng_state()
    report = handle.verify(batch)
    assert same_state(state_of(model), before) and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert report.is_exact and report.headroom_bits == handle.headroom_bits


def test_losses_and_states_are_those_without_and_with_the_coupling():
    model = model_of("bert", dropout=0.1).eval()
    batch = inputs_of("bert", model)

    def loss_and_last():
        with torch.no_grad():
            outputs = model.eval()(**batch, output_hidden_states=True)
        return outputs.loss.item(), outputs.hidden_states[-1]

    plain, was = loss_and_last()
    handle = reversible_of(model, "centred", "exact")
    report = handle.verify(batch)
    coupled, now = loss_and_last()
    assert report.plain_loss == pytest.approx(plain, rel=1e-9) and report.loss == pytest.approx(coupled, rel=1e-6)
    assert report.state_change == pytest.approx(((now - was).norm() / was.norm()).item(), rel=1e-3)
    assert abs(coupled - plain) > 1e-4 * plain and report.loss_change == report.loss - report.plain_loss


def test_a_kernel_that_does_not_repeat_is_noticed():
    """What verify is for: a layer that gives something else the second time, as atomic additions on a GPU do."""
    model = model_of("bert", dtype=torch.float32)
    handle = reversible_of(model, "centred", "exact")
    layer, calls = model.bert.encoder.layer[1].output, []

    def unsteady(module, args, output):
        calls.append(module)
        return output * (1 + 1e-4 * len(calls))

    layer.register_forward_hook(unsteady)
    assert not handle.verify(inputs_of("bert", model)).is_exact


def test_a_small_scale_keeps_the_start():
    """Nearer with each power of two; zero adapters, so that the coupling alone is seen."""
    changes = []
    for scale in (1 / 4, 1 / 16, 1 / 64):
        model = model_of("bert", dtype=torch.float64)
        handle = make_reversible(model, ReversibleConfig(reversible="centred", reversible_scale=scale, adapter_init_std=0.0))
        changes.append(handle.verify(inputs_of("bert", model)).state_change)
    assert changes[0] > 2 * changes[1] > 4 * changes[2] > 0
