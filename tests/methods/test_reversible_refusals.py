"""Reversible layers refuse, before anything is changed, what they cannot do; and raise where they cannot go on."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from hf_memtune import ConfigError, InverseError, ReversibleConfig, StreamOverflowError, UnsupportedModelError
from hf_memtune.methods.reversible.handle import make_reversible
from hf_memtune.methods.two_level import checkpoint_in_two_levels
from tests.support.any_type import batch_of, tiny
from tests.support.reversible_models import inputs_of, model_of, reversible_of, settings, step, twin
from tests.support.reversible_removal import same_state, state_of
from tests.support.tolerances import NOTICED, close
from tests.support.twin import worst_difference


def assert_refused(model, coupling="centred", match=None, **changed):
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=match):
        reversible_of(model, coupling, **changed)
    assert same_state(state_of(model), before)


@pytest.mark.parametrize("name, key", [("opt", "layerdrop"), ("bart", "encoder_layerdrop"), ("bart", "decoder_layerdrop")])
def test_layerdrop_is_refused(name, key):
    assert_refused(model_of(name, **{key: 0.1}), match=f"{key}=0.1: layers are left out at random")


def test_adapters_that_peft_put_in_without_a_wrapper_are_refused():
    """They would be frozen without a word. Siblings: without adapters of ours, and with a wrapper, they learn."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = model_of("llama")
    model.add_adapter(lora)
    assert_refused(model, match="put in by add_adapter.*get_peft_model")
    reversible_of(model, "centred", adapter_rank=0)
    wrapped = get_peft_model(model_of("llama"), lora)
    reversible_of(wrapped, "centred")
    for each in (model, wrapped):
        assert any(p.requires_grad for name, p in each.named_parameters() if "lora_" in name)


def test_router_losses_are_refused():
    assert_refused(model_of("mixtral", output_router_logits=True), match="auxiliary loss of its routers")


def test_attention_weights_are_refused():
    assert_refused(model_of("bert", attn_implementation="eager", output_attentions=True), match="output_attentions=True")
    model = model_of("llama", attn_implementation="eager")
    reversible_of(model, "centred")
    with pytest.raises(UnsupportedModelError, match="without a gradient"):
        model(**inputs_of("llama", model), output_attentions=True)


@pytest.mark.parametrize("name", ["gpt_neox", "cohere2"])
def test_parallel_blocks_are_refused_for_meft3_alone(name):
    assert_refused(model_of(name), "meft3", match="beside each other")
    reversible_of(model_of(name), "meft1")


@pytest.mark.parametrize("name, kind, problem", [("afmoe", "causal", "is off by"), ("esm", "masked", "fails")])
def test_a_layer_that_holds_more_than_its_halves_is_refused(name, kind, problem):
    """AFMoE's layers have Llama's modules, and more norms: apart they would be other layers. Sibling: Llama's own are taken."""
    model = tiny(name, kind)
    reversible_of(model, "meft3")
    with pytest.raises(UnsupportedModelError, match=f"is not its attention and then its MLP.*that {problem}.*Use centred"):
        model(**batch_of(model, kind))
    for other in (tiny(name, kind), tiny("llama", "causal")):
        reversible_of(other, "meft3" if other.config.model_type == "llama" else "meft1")
        other(**batch_of(other, kind))


@pytest.mark.parametrize("changed, match", [({"num_hidden_layers": 1}, "no stack of two"), ({"reversible_layers": 4}, "expected 2 to 3")])
def test_too_few_layers_are_refused(changed, match):
    of_model = {key: value for key, value in changed.items() if key.startswith("num")}
    assert_refused(model_of("llama", **of_model), match=match, **{key: value for key, value in changed.items() if key not in of_model})


def test_a_model_on_several_devices_is_refused():
    model = model_of("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    assert_refused(model, match="spread over 0, cpu")


def test_an_unknown_layout_is_refused_for_adapters_alone():
    assert_refused(model_of("modernbert"), match="is laid out is not known")
    reversible_of(model_of("modernbert"), "centred", adapter_rank=0)


def test_one_layer_in_two_places_is_refused():
    model = model_of("llama")
    model.model.layers[2] = model.model.layers[0]
    assert_refused(model, match="several places")


def test_reversible_twice_is_refused():
    model = model_of("bert")
    handle = reversible_of(model, "centred")
    with pytest.raises(UnsupportedModelError, match="reversible already"):
        reversible_of(model, "centred", adapter_rank=0)
    handle.restore()
    reversible_of(model, "centred")


def test_a_plain_module_and_no_coupling_are_refused():
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        make_reversible(torch.nn.Linear(2, 2), settings("centred"))
    with pytest.raises(ConfigError, match="expected a coupling"):
        make_reversible(model_of("bert"), ReversibleConfig())


@pytest.mark.parametrize("put_on", [checkpoint_in_two_levels, partial(make_reversible, config=settings("centred", adapter_rank=0))])
def test_prefix_tuning_is_refused(put_on):
    adapted = get_peft_model(model_of("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="peft_type=PREFIX_TUNING"):
        put_on(adapted)


@pytest.mark.filterwarnings("ignore:reversible_numerics=float")
@pytest.mark.parametrize("put_on", [checkpoint_in_two_levels, partial(make_reversible, config=settings("centred", adapter_rank=0))])
def test_a_filled_cache_is_refused(put_on):
    model = model_of("llama")
    put_on(model)
    batch = {key: value for key, value in inputs_of("llama", model).items() if key != "use_cache"}
    with torch.no_grad():
        cache = model(batch["input_ids"][:, :3]).past_key_values
    with pytest.raises(UnsupportedModelError, match="cache with 3 tokens"):
        model(batch["input_ids"], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:reversible_numerics=float")
@pytest.mark.parametrize("goes_on_with", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("put_on", [checkpoint_in_two_levels, partial(make_reversible, config=settings("centred", adapter_rank=0))])
def test_a_cache_that_a_call_with_gradient_left_empty_is_refused(put_on, goes_on_with):
    """The model hands it out as if it were filled, and a call that goes on with it would answer to the last tokens alone."""
    model = model_of("llama").eval()
    put_on(model)
    tokens = inputs_of("llama", model)["input_ids"][:1]
    empty = model(tokens[:, :-1]).past_key_values
    with goes_on_with(), pytest.raises(UnsupportedModelError, match=r"left empty in an earlier call.*inside of torch.no_grad\(\)"):
        model(tokens[:, -1:], past_key_values=empty)
    with torch.no_grad():  # the remedy
        filled = model(tokens[:, :-1]).past_key_values
        found, expected = model(tokens[:, -1:], past_key_values=filled), model(tokens)
    torch.testing.assert_close(found.logits[:, -1], expected.logits[:, -1], **close(torch.float64, float32_inside=True))


def test_something_between_the_layers_is_refused():
    model = model_of("llama")
    reversible_of(model, "centred")
    first, second = model.model.layers[0], model.model.layers[1]
    model.model.layers[0], model.model.layers[1] = second, first
    with pytest.raises(UnsupportedModelError, match="was not given what the layer before it returned"):
        model(**inputs_of("llama", model))


def bent(module, args, output):
    return output[0].sin(), *output[1:]


def bent_in_place(module, args, output):
    output[0].detach().sin_()


HOOKS = {
    "forward": lambda layers: layers[0].register_forward_hook(bent),
    "forward, in place": lambda layers: layers[0].register_forward_hook(bent_in_place),
    "forward-pre": lambda layers: layers[1].register_forward_pre_hook(lambda module, args: ((args[0][0].sin(), *args[0][1:]), *args[1:])),
    "full backward": lambda layers: layers[2].register_full_backward_hook(lambda module, gradients, arriving: None),
    "full backward, first": lambda layers: layers[0].register_full_backward_hook(lambda module, gradients, arriving: None),
}


@pytest.mark.parametrize("numerics", ["float", "exact"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_between_the_layers_is_refused(hook, numerics):
    model, batch = model_of("llama"), inputs_of("llama", model_of("llama"))
    reversible_of(model, "centred", numerics, adapter_rank=0)
    HOOKS[hook](model.model.layers)
    with pytest.raises(UnsupportedModelError, match="Put hooks that do it on modules inside"):
        model(**batch)


def test_hooks_that_record_or_are_inside_of_the_layers_stay():
    model, batch = model_of("llama"), inputs_of("llama", model_of("llama"))
    handle = reversible_of(model, "centred", "exact", adapter_rank=0)
    plain = step(model, batch)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    recorded = step(model, batch)
    assert len(seen) == 6 and worst_difference(recorded[1], plain[1]) == 0
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    ours = step(model, batch)
    with twin(handle):
        theirs = step(model, batch)
    assert worst_difference(ours[1], theirs[1]) == 0 and worst_difference(ours[1], plain[1]) > NOTICED


def test_a_loss_from_the_middle_is_refused():
    model = model_of("llama")
    model.model.embed_tokens.requires_grad_(False)
    reversible_of(model, "centred", adapter_rank=0)
    hidden = model(**inputs_of("llama", model), output_hidden_states=True).hidden_states
    with pytest.raises(InverseError, match="in the middle of the stack"):
        hidden[1].sum().backward()


def test_overflow_raises_before_backward_and_names_the_layer():
    model = model_of("llama", dtype=torch.float32)
    batch = inputs_of("llama", model)
    handle = reversible_of(model, "centred", "exact", reversible_fraction_bits=20)
    model(**batch)
    assert 5 < handle.headroom_bits < 12
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    for mode in (torch.enable_grad, torch.no_grad):
        with (
            mode(),
            pytest.raises(StreamOverflowError, match=r"model.layers.1: its output reaches .* reversible_fraction_bits to \d+ or less"),
        ):
            model(**batch)
