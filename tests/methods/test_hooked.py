"""Hooks of a user on modules of the body: what they change is learned through, and a loss of what they keep is refused."""

import weakref

import pytest
import torch

from hf_memtune import InverseError, Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from tests.support.tiny_models import batch_for, tiny_model

PLACES = ("model.layers.1.mlp", "model.layers.1", "model.norm", "model.embed_tokens")
CONFIGS = {
    "chunks": StreamingConfig(sequence_chunk_size=4),
    "layers": StreamingConfig(sequence_chunk_size=4, stream_order="layers"),
    "skip": TokenSeekingConfig(token_seeking=True, token_ratio=1.0, token_gradient="skip", sequence_chunk_size=4),
    "cut": TokenSeekingConfig(token_seeking=True, token_ratio=0.5),
}
EXACT = ("chunks", "layers", "skip")


def put_on(name, model):
    if name is None:
        return None
    config = CONFIGS[name]
    return (TokenSeeking if isinstance(config, TokenSeekingConfig) else Streaming)(model, config)


def gradients(name, hook, place, before=False, of_kept=None):
    """Of one step with a hook at a place. of_kept: a loss of what the hook has kept, or None."""
    model, kept = tiny_model("llama").double(), []
    module = model.get_submodule(place)
    if before:
        module.register_forward_pre_hook(lambda module, args, kwargs: kept.append(args[0]), with_kwargs=True)
    else:
        module.register_forward_hook(lambda module, args, output: hook(kept, output))
    method = put_on(name, model)
    kept.clear()  # what the probe has left
    loss = model(**batch_for(model)).loss
    (loss if of_kept is None else loss + of_kept(kept)).backward()
    if method is not None:
        method.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def keep(kept, output):
    kept.append(output)


def penalty(kept):
    return sum(each.square().sum() for each in kept)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", PLACES)
def test_a_loss_of_what_a_hook_has_kept_is_refused(name, place):
    plain = gradients(None, keep, place, of_kept=penalty)
    assert any(not torch.equal(plain[key], value) for key, value in gradients(None, keep, place).items())  # it would be learned
    with pytest.raises(InverseError, match=f"{place.removeprefix('model.')}: the loss depends on what a forward hook"):
        gradients(name, keep, place, of_kept=penalty)


@pytest.mark.parametrize("name", CONFIGS)
def test_so_is_one_of_what_goes_into_a_module(name):
    with pytest.raises(InverseError, match="forward hook on this module has kept"):
        gradients(name, None, "model.layers.1", before=True, of_kept=penalty)


def larger(kept, output):
    return output * 1.5


def larger_in_place(kept, output):
    output.mul_(1.5)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("hook", [keep, larger, larger_in_place])
@pytest.mark.parametrize("place", PLACES[::3])
def test_hooks_that_keep_or_change_what_goes_on_leave_the_gradient_exact(name, hook, place):
    found, plain = (gradients(each, hook, place) for each in (name, None))
    assert found.keys() == plain.keys()
    assert all(torch.allclose(found[key], value, rtol=1e-5, atol=1e-8) for key, value in plain.items())  # the loss is one in float32
    unhooked = gradients(name, lambda kept, output: None, place)
    assert (hook is keep) == all(torch.equal(found[key], value) for key, value in unhooked.items())


def test_what_a_hook_keeps_has_the_values_and_dies_with_it():
    """In the pass without gradient chunks of the row, in order; and no cycle keeps them."""
    model, kept = tiny_model("llama"), []
    model.model.norm.register_forward_hook(lambda module, args, output: kept.append(output))
    batch = batch_for(model)
    with torch.no_grad():
        model(**batch)
        whole = kept.pop()
    with Streaming(model, CONFIGS["chunks"]):
        kept.clear()
        model(**batch)
        assert torch.allclose(torch.cat(kept, dim=1), whole, atol=1e-6)
        gone = weakref.ref(kept[0])
        kept.clear()
        assert gone() is None


def test_nothing_is_left_on_the_model_between_calls():
    """Also where a call fails."""
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(_nothing)
    before = hooks_of(model)
    with Streaming(model, CONFIGS["chunks"]):
        loss = model(**batch_for(model)).loss
        assert hooks_of(model) == before
        loss.backward()
        assert hooks_of(model) == before
        failing = model.model.layers[1].register_forward_hook(_failing)
        with pytest.raises(ZeroDivisionError):
            model(**batch_for(model))
        failing.remove()
        assert hooks_of(model) == before and torch.is_grad_enabled()


def _nothing(module, args, output):
    return None


def _failing(module, args, output):
    raise ZeroDivisionError


def hooks_of(model):
    return {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}


def test_hooks_that_come_later_are_watched_and_told_of(caplog):
    model, kept = tiny_model("llama"), []
    batch = batch_for(model)
    with Streaming(model, CONFIGS["chunks"]):
        model(**batch).loss.backward()
        assert "hooks" not in caplog.text
        model.model.norm.register_forward_hook(lambda module, args, output: kept.append(output))
        for _ in range(2):
            kept.clear()
            loss = model(**batch).loss
            with pytest.raises(InverseError, match="forward hook"):
                (loss + penalty(kept)).backward()
    assert caplog.text.count("forward hooks were put on norm after the method") == 1
