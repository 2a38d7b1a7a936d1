"""What `verify` says before the first step, and how near the start is to the pre-trained model."""

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
    assert report.is_exact and report.state_change > 0 and report.loss_change == report.loss - report.plain_loss
    assert report.headroom_bits == handle.headroom_bits


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
