"""Between steps, after errors and after `remove()`, the model is the one it was: nothing set, hooked, renamed or registered."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hf_memtune.errors import MemTuneError
from tests.methods.stepping import model_and_batch, seeking_on
from tests.methods.twin import gradients

NAMES = ["llama", "gemma2", "gpt2", "opt", "bert", "bart"]
HOOKS = [key for key in vars(torch.nn.Module()) if key.endswith("_hooks")]


def registered():
    return set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)


def traces(model):
    """Everything that token seeking could leave on a model."""
    modules = dict(model.named_modules())
    return {
        "parameters": list(model.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: {h: len(vars(module)[h] or ()) for h in HOOKS} for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attention": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "config attributes": sorted(vars(model.config)),
        "checkpointing": {
            name: getattr(vars(module).get("_gradient_checkpointing_func"), "func", None) for name, module in modules.items()
        },
    }


def assert_untouched(model, untouched, batch):
    assert traces(model) == traces(untouched)
    for training in (True, False):
        with torch.no_grad():
            found, expected = model.train(training)(**batch), untouched.train(training)(**batch)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)
    model.train(), untouched.train()


def watched(name, checkpointing=False):
    """A model, a copy that nothing is done to, and a batch. One submodule is out of training mode, as a user may have it."""
    model, batch, _ = model_and_batch(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    untouched = copy.deepcopy(model)
    for each in (model, untouched):
        list(each.modules())[-1].training = False
    return model, untouched, batch


def step_on(seeking, model, batch):
    with seeking.step(batch) as step:
        outputs = model(**step.inputs)
    gradients(model, step.loss_sum(outputs))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scorer", ["combined", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left(name, scorer, checkpointing):
    model, untouched, batch = watched(name, checkpointing)
    before, names = traces(model), registered()
    seeking = seeking_on(model, token_scorer=scorer)
    assert traces(model) == before
    step_on(seeking, model, batch)
    assert traces(model) == before  # between steps
    step_on(seeking, model, batch)
    seeking.remove()
    assert registered() == names
    assert traces(model) == before
    assert_untouched(model, untouched, batch)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_between_steps_is_that_of_the_plain_model(name):
    model, untouched, batch = watched(name)
    seeking = seeking_on(model)
    step_on(seeking, model, batch)
    with torch.no_grad():
        found, expected = model.eval()(**batch), untouched.eval()(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    model.train()
    step_on(seeking, model, batch)
    seeking.remove()


class Interruption(Exception):
    """Raised from inside a step."""


def raising(*args, **kwargs):
    raise Interruption


def raise_in_scorer(model, batch):
    step_on(seeking_on(model, raising), model, batch)


def raise_in_gradient_score(model, batch):
    def scorer(seen):
        seen.gradient_score
        raise Interruption

    step_on(seeking_on(model, scorer), model, batch)


def raise_after_the_call(model, batch):
    with seeking_on(model).step(batch) as step:
        model(**step.inputs)
        raise Interruption


def raise_in_a_layer(number):
    """In the n-th call of the last layer: context pass, scoring, focus pass."""

    def act(model, batch):
        calls = []

        def hook(*args):
            calls.append(1)
            if len(calls) == number:
                raise Interruption

        layer = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)][-1][-1]
        seeking = seeking_on(model)
        handle = layer.register_forward_pre_hook(hook)
        try:
            step_on(seeking, model, batch)
        finally:
            handle.remove()

    return act


def raise_in_backward(model, batch):
    with (seeking := seeking_on(model)).step(batch) as step:
        loss = step.loss_sum(model(**step.inputs))
    next(iter(model.parameters())).register_hook(raising)
    try:
        loss.backward()
    finally:
        seeking.remove()
        parameter = next(iter(model.parameters()))
        parameter._backward_hooks.clear()


ACTS = [raise_in_scorer, raise_in_gradient_score, raise_after_the_call, raise_in_a_layer(1), raise_in_a_layer(2), raise_in_a_layer(3), raise_in_backward]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_an_error_inside_a_step_leaves_nothing(name, act, checkpointing):
    model, untouched, batch = watched(name, checkpointing)
    before = traces(model)
    with pytest.raises(Interruption):
        act(model, batch)
    model.zero_grad()
    assert traces(model) == before
    assert_untouched(model, untouched, batch)


def test_a_refused_model_leaves_no_name_behind():
    names = registered()
    model, _, _ = model_and_batch("llama")
    with pytest.raises(MemTuneError):
        seeking_on(model, context_layer=17)
    model.config.output_router_logits = True
    with pytest.raises(MemTuneError):
        seeking_on(model)
    assert registered() == names


def test_probing_draws_no_random_numbers():
    model, _, _ = model_and_batch("llama")
    state = torch.get_rng_state()
    seeking_on(model).remove()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_removed_seeking_says_so_and_may_be_removed_again():
    model, _, batch = watched("llama")
    seeking = seeking_on(model)
    seeking.remove()
    seeking.remove()
    with pytest.raises(MemTuneError, match="removed"):
        seeking.step(batch)


# -- siblings: leaks that the comparison must notice -----------------------------------------------------------------


def leak_forward(model):
    model.base_model.forward = model.base_model.forward


def leak_hook(model):
    model.base_model.layers[0].register_forward_pre_hook(lambda *args: None)


def leak_training(model):
    model.base_model.layers[0].mlp.training = False


def leak_attention_name(model):
    model.config._attn_implementation_internal = "hf_memtune-0"


def leak_checkpointing(model):
    model.base_model.layers[0]._gradient_checkpointing_func = raising


@pytest.mark.parametrize("leak", [leak_forward, leak_hook, leak_training, leak_attention_name, leak_checkpointing])
def test_a_leak_is_noticed(leak):
    model, untouched, _ = watched("llama", checkpointing=True)
    assert traces(model) == traces(untouched)
    leak(model)
    assert traces(model) != traces(untouched)


def test_a_dropped_strategy_keeps_no_model_alive():
    """Forgetting remove() must not pin a model in transformers' interfaces for the rest of the process."""
    model, *_ = model_and_batch("llama")
    seeking = seeking_on(model)
    name, alive = seeking.router.name, weakref.ref(model)
    assert name in AttentionInterface._global_mapping
    del model, seeking
    gc.collect()
    assert alive() is None
    assert name not in AttentionInterface._global_mapping and name not in AttentionMaskInterface._global_mapping
