"""While a method is on, three forwards are overridden and nothing else; after `remove()`, and on copies, the model is the one it was."""

import copy
import gc
import io
import pickle
import weakref
from contextlib import contextmanager
from functools import partial

import peft
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.methods.events import Listener
from hf_memtune.methods.overrides import Override
from tests.support.removal import registered, traces
from tests.support.stepping import loss_of, model_and_batch, seeking_on, step_on
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, worst_difference

NAMES = ["llama", "gemma2", "gpt2", "opt", "bert", "bart"]
IN_CHUNKS = dict(sequence_chunk_size=4)
METHODS = {
    "combined": partial(seeking_on, token_scorer="combined"),
    "random": partial(seeking_on, token_scorer="random"),
    "stream": partial(seeking_on, token_scorer="random", token_gradient="stream", **IN_CHUNKS),
    "streaming": lambda model: Streaming(model, StreamingConfig(**IN_CHUNKS)),
}
STREAMS = ["stream", "streaming"]


def identities_apart(found):
    """Of a copy: all but which tensors they are."""
    return {name: value for name, value in found.items() if name != "own parameters"}


def without_overrides(found, architecture):
    """The traces of a model that a method is on, without the three forwards that are its override."""
    ours = {id(architecture.base), id(architecture.head_model), id(architecture.output_head)}
    names = [name for name, module in architecture.head_model.named_modules() if id(module) in ours]
    assert len(names) == len(ours - {id(None)})
    assert all(type(found["forwards"][name]) is Override for name in names)
    attributes = {n: [a for a in each if n not in names or a != "forward"] for n, each in found["attributes"].items()}
    return found | {"attributes": attributes, "forwards": found["forwards"] | dict.fromkeys(names)}


def assert_untouched(model, untouched, batch):
    assert identities_apart(traces(model)) == identities_apart(traces(untouched))
    values, expected = model.state_dict(), untouched.state_dict()
    assert all(torch.equal(values[name], value) for name, value in expected.items())
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


def skip_where_it_cannot_stream(name, method):
    if name == "bert" and method in STREAMS:
        pytest.skip("bidirectional")


@pytest.mark.parametrize("name, checkpointing", [*((name, False) for name in NAMES), ("llama", True), ("bart", True)])
@pytest.mark.parametrize("method", METHODS)
def test_three_forwards_are_overridden_and_then_nothing_is_left(name, method, checkpointing):
    skip_where_it_cannot_stream(name, method)
    model, untouched, batch = watched(name, checkpointing)
    before, names = traces(model), registered()
    installed = METHODS[method](model)
    for _ in range(2):
        assert without_overrides(traces(model), installed.architecture) == before
        step_on(model, installed, batch)
    assert without_overrides(traces(model), installed.architecture) == before
    installed.remove()
    assert registered() <= names
    assert traces(model) == before
    assert_untouched(model, untouched, batch)


# -- calls that a method leaves alone ----------------------------------------------------------------------------------


def assert_bit_equal(found, expected):
    assert type(found.logits) is torch.Tensor
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_calls_that_do_not_learn_are_the_models_own(name, method, caplog):
    skip_where_it_cannot_stream(name, method)
    model, untouched, batch = watched(name)
    with METHODS[method](model) as installed:
        step_on(model, installed, batch)
        with torch.no_grad():
            assert_bit_equal(model(**batch), untouched(**batch))
        with torch.inference_mode():
            assert_bit_equal(model.eval()(**batch), untouched.eval()(**batch))
            model.train(), untouched.train()
        assert "evaluation mode" not in caplog.text
        assert_bit_equal(model.eval()(**batch), untouched.eval()(**batch))  # with gradient
        assert model(**batch).logits.requires_grad
        assert caplog.text.count("in evaluation mode was the model's own") == 1  # a loop without model.train() is told
        model.train(), untouched.train()
        step_on(model, installed, batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calls_without_adapters_are_the_models_own(name, method):
    """In training mode, and with gradient enabled: the reference of a preference loss."""
    model, batch, _ = model_and_batch(name)
    expected = model(**batch)
    targets = ["c_attn"] if name == "gpt2" else "all-linear"
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).train()
    with METHODS[method](model):
        with model.disable_adapter():
            assert_bit_equal(model(**batch), expected)
            with torch.no_grad():
                assert_bit_equal(model(**batch), expected)
        assert not torch.equal(model(**batch).logits + 0, expected.logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_generation_is_the_models_own(name, method, training):
    model, batch, _ = model_and_batch(name, lengths=(9, 9))
    model.train(training)
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8)
    expected = model.generate(**inputs), model.generate(**inputs, num_beams=2)
    with METHODS[method](model) as installed:
        if training:
            step_on(model, installed, batch)
        found = model.generate(**inputs), model.generate(**inputs, num_beams=2)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


# -- copies ------------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name, copied", [("llama", copy.deepcopy), ("bart", copy.deepcopy), ("llama", pickled), ("bart", saved)])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_model_that_a_method_is_on_is_plain(name, method, copied):
    model, batch, dtype = model_and_batch(name)
    expected = gradients(model, model(**batch).loss)
    with METHODS[method](model) as installed:
        step_on(model, installed, batch)
        twin = copied(model)
        again = step_on(model, installed, batch).gradients  # the method is on the model still, and on that alone
    assert not any(isinstance(vars(module).get("forward"), Override) for module in twin.modules())
    outputs = twin(**batch)
    assert type(outputs.logits) is torch.Tensor
    found = gradients(twin, outputs.loss)
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    if method != "streaming":
        assert worst_difference(again, expected) > NOTICED
    with METHODS[method](twin) as other:  # and can have one of its own
        step_on(twin, other, batch)
        assert (other.architecture.output_head is None) == (installed.architecture.output_head is None)  # with the loss without logits
    assert_bit_equal(twin(**batch), model(**batch))


def test_a_copy_keeps_what_was_there_before_the_method():
    model, batch, _ = model_and_batch("llama")
    own = Doubling(model)
    model.forward = own.forward
    with METHODS["streaming"](model):
        twin = copy.deepcopy(model)
    assert vars(model)["forward"] == own.forward
    assert type(vars(twin)["forward"].__self__) is Doubling
    assert torch.equal(twin(**batch).loss, 2 * type(model).forward(model, **batch).loss)


class Doubling:
    """Somebody else's override of a forward."""

    def __init__(self, model):
        self.model, self.earlier = model, None

    def forward(self, *args, **kwargs):
        earlier = self.earlier or partial(type(self.model).forward, self.model)
        outputs = earlier(*args, **kwargs)
        outputs.loss = outputs.loss * 2
        return outputs


# -- overrides of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_override_that_was_put_on_top_stays(method):
    """Accelerate and peft put forwards of their own on models, before a method and after it."""
    model, batch, dtype = model_and_batch("llama")
    plain = model(**batch).loss
    expected = gradients(model, 2 * plain)
    on_top = Doubling(model)
    with METHODS[method](model) as installed:
        on_top.earlier = model.forward
        model.forward = on_top.forward
        loss = model(**batch).loss
        if method in STREAMS[1:]:
            assert worst_difference(gradients(model, loss), expected) <= tolerance(torch.float32)
    assert vars(model)["forward"] == on_top.forward
    assert not any(isinstance(vars(m).get("forward"), Override) for m in (installed.architecture.base, installed.architecture.output_head))
    doubled = model(**batch)
    assert type(doubled.logits) is torch.Tensor and torch.equal(doubled.loss, 2 * plain)
    found = gradients(model, doubled.loss)
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.mark.parametrize("first", METHODS)
def test_a_second_method_is_refused_and_the_first_stays(first):
    model, untouched, batch = watched("llama")
    gc.collect()  # what is known shall be that afterwards
    before, names = traces(model), registered()
    with METHODS[first](model) as installed:
        on, known = traces(model), registered()
        for second in METHODS:
            with pytest.raises(ConfigError, match="is on this model already"):
                METHODS[second](model)
        assert traces(model) == on and registered() <= known
        step_on(model, installed, batch)
    assert traces(model) == before and registered() <= names
    METHODS["streaming"](model).remove()
    assert_untouched(model, untouched, batch)


# -- weights of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_inside", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "by layers"])
def test_weights_that_are_put_in_for_one_call(method, tied, loss_inside):
    """torch.func.functional_call: trained and frozen weights and buffers are those of the call, in its backward too, and then the model's own."""
    model, batch, _ = model_and_batch("llama", tie_word_embeddings=tied)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" not in key)
    given = {key: (1.1 * value.detach()).requires_grad_(value.requires_grad) for key, value in model.named_parameters()}
    given |= {key: 1.1 * value for key, value in model.named_buffers()}
    batch, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    before, own = {**dict(model.named_parameters()), **dict(model.named_buffers())}, registered()

    def step(model, call):
        torch.manual_seed(0)
        if loss_inside:
            return call(model, **batch, labels=labels).loss.backward()
        model.loss_function(call(model, **batch).logits, labels, vocab_size=model.config.vocab_size).backward()

    twin = copy.deepcopy(model)
    twin.load_state_dict(given, strict=False)
    for (key, buffer), other in zip(twin.named_buffers(), model.buffers()):
        buffer.copy_(given[key])
        assert not torch.equal(buffer, other)
    put = METHODS.get(method, lambda model: Streaming(model, StreamingConfig(stream_order="layers", **IN_CHUNKS)))
    with put(twin), put(model):
        step(twin, lambda model, **inputs: model(**inputs))
        step(model, lambda model, **inputs: torch.func.functional_call(model, given, (), inputs))
        assert all(parameter.grad is None for parameter in model.parameters())
        expected = {key: value.grad for key, value in twin.named_parameters() if value.grad is not None}
        found = {key: given[key].grad for key in expected}
        assert worst_difference(found, expected) <= tolerance(torch.float32)
        assert worst_difference({key: 0.99 * value for key, value in found.items()}, expected) > NOTICED
    assert all(value is before[key] for key, value in [*model.named_parameters(), *model.named_buffers()])
    assert registered() <= own


# -- what a call holds -------------------------------------------------------------------------------------------------


class Stored(Listener):
    """Weak references to the keys and values of calls."""

    def __init__(self):
        self.tensors = []

    def context_begins(self, stored):
        self._stored = stored

    def context_ends(self):
        self.tensors += [weakref.ref(tensor) for tensor in self._stored()]
        del self._stored

    @property
    def alive(self):
        return sum(ref() is not None for ref in self.tensors)


@contextmanager
def uncollected():
    """While open, what is only reachable from a cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


HOLDING = ["combined", "random", "stream", "streaming"]


@pytest.mark.parametrize("use", ["outputs", "own loss", "fused loss", "loss of logits", "body alone"])
@pytest.mark.parametrize("method", HOLDING)
@pytest.mark.parametrize("name", ["llama", "bart", "gpt2"])
def test_a_call_whose_output_is_dropped_leaves_nothing(name, method, use):
    model, batch, _ = model_and_batch(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name == "bart":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    take = {
        "outputs": lambda: model(**inputs),
        "own loss": lambda: model(**batch).loss,
        "fused loss": lambda: loss_of(model, batch),
        "loss of logits": lambda: model(**inputs).logits.square().sum(),
        "body alone": lambda: model.base_model(**inputs),
    }[use]
    with METHODS[method](model) as installed, uncollected():
        stored = Stored()
        installed.listeners.add(stored)
        held = take()
        assert stored.tensors and (stored.alive or use == "own loss")
        del held
        assert not stored.alive


@pytest.mark.parametrize("method", HOLDING)
def test_a_call_that_went_backward_leaves_nothing_but_its_output(method):
    model, batch, _ = model_and_batch("llama")
    with METHODS[method](model) as installed, uncollected():
        stored = Stored()
        installed.listeners.add(stored)
        outputs = model(**batch)
        outputs.loss.backward()
        assert stored.tensors and not stored.alive


def test_what_is_held_is_noticed():
    model, batch, _ = model_and_batch("llama")
    with METHODS["streaming"](model) as installed:
        stored, holder = Stored(), []
        installed.listeners.add(stored)
        stored.context_ends = lambda: (holder.extend(stored._stored()), Stored.context_ends(stored))
        model(**batch)
    assert stored.alive == len(stored.tensors)


# -- backward ----------------------------------------------------------------------------------------------------------


def a_loss_of(model, batch, use):
    if use == "own":
        return model(**batch).loss
    inputs = {name: value for name, value in batch.items() if name != "labels" or use == "of logits"}
    values = model(**inputs).logits if use == "of logits" else model.base_model(**inputs).last_hidden_state
    return values.square().mean()


@pytest.mark.parametrize("use", ["own", "of logits", "of the body"])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_is_refused(method, use):
    model, batch, _ = model_and_batch("llama")
    with METHODS[method](model):
        loss = a_loss_of(model, batch, use)
        loss.backward(retain_graph=True)
        with pytest.raises(MemTuneError, match="a second time"):
            loss.backward()


@pytest.mark.parametrize("use", ["own", "of logits", "of the body"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_can_go_backward_after_the_method_was_removed(method, use):
    model, untouched, batch = watched("llama")
    before, names = traces(model), registered()
    torch.manual_seed(3)
    with METHODS[method](model):
        expected = gradients(model, a_loss_of(model, batch, use))
    torch.manual_seed(3)
    with METHODS[method](model):
        loss = a_loss_of(model, batch, use)
    with torch.no_grad():
        model(**batch)  # the model is free meanwhile
    found = gradients(model, loss)
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    assert traces(model) == before
    del loss
    gc.collect()
    assert registered() <= names
    assert_untouched(model, untouched, batch)


# -- errors ------------------------------------------------------------------------------------------------------------


class Interruption(Exception):
    """Raised from inside a step."""


def raising(*args, **kwargs):
    raise Interruption


def raise_in_scorer(model, batch, kind):
    with seeking_on(model, raising, **kind) as seeking:
        step_on(model, seeking, batch)


def raise_in_gradient_score(model, batch, kind):
    def scorer(seen):
        seen.gradient_score
        raise Interruption

    with seeking_on(model, scorer, **kind) as seeking:
        step_on(model, seeking, batch)


def raise_after_the_call(model, batch, kind):
    with seeking_on(model, **kind):
        model(**batch)
        raise Interruption


def raise_in_a_layer(number, with_gradient=False):
    """In the n-th call of the last layer: context pass, scoring, kept tokens. with_gradient: of those with gradient."""

    def act(model, batch, kind):
        calls = []

        def hook(*args):
            calls.append(torch.is_grad_enabled() or not with_gradient)
            if sum(calls) == number:
                raise Interruption

        layer = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)][-1][-1]
        with seeking_on(model, **kind) as seeking:
            on = traces(model)
            handle = layer.register_forward_pre_hook(hook)
            try:
                step_on(model, seeking, batch)
            finally:
                handle.remove()
                assert traces(model) == on
                model.zero_grad()
                step_on(model, seeking, batch)  # the next step is as good as any

    act.__name__ = f"raise_in_call_{number}_of_a_layer{'_with_gradient' * with_gradient}"
    return act


def raise_in_backward(model, batch, kind):
    with seeking_on(model, **kind):
        loss, _ = loss_of(model, batch)
        parameter = next(iter(model.parameters()))
        parameter.register_hook(raising)
        try:
            loss.backward()
        finally:
            parameter._backward_hooks.clear()


IN_LAYERS = [raise_in_a_layer(number) for number in (1, 2, 3)] + [raise_in_a_layer(number, True) for number in (1, 2)]
ACTS = [raise_in_scorer, raise_in_gradient_score, raise_after_the_call, *IN_LAYERS, raise_in_backward]


@pytest.mark.parametrize("name, checkpointing", [("llama", False), ("llama", True), ("bart", False)])
@pytest.mark.parametrize("kind", [{}, dict(token_gradient="stream", **IN_CHUNKS)], ids=["cut", "stream"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_an_error_inside_a_step_leaves_nothing(name, act, kind, checkpointing):
    model, untouched, batch = watched(name, checkpointing)
    before, names = traces(model), registered()
    with pytest.raises(Interruption):
        act(model, batch, kind)
    model.zero_grad()
    gc.collect()  # the error has held what it went through
    assert traces(model) == before and registered() <= names
    assert_untouched(model, untouched, batch)


def test_a_refused_model_leaves_no_name_behind():
    names = registered()
    model, _, _ = model_and_batch("bert")
    before = traces(model)
    with pytest.raises(MemTuneError):
        seeking_on(model, context_layer=17)
    with pytest.raises(MemTuneError):
        METHODS["streaming"](model)
    assert registered() <= names and traces(model) == before


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
        seeking.inspect(batch)


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
    assert identities_apart(traces(model)) == identities_apart(traces(untouched))
    leak(model)
    assert identities_apart(traces(model)) != identities_apart(traces(untouched))


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
