"""Two-level checkpointing: the gradients of plain training, on fewer bytes than checkpointing every layer."""

import copy
import gc

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model

from hf_memtune import ConfigError, InverseError, LiveBytes, UnsupportedModelError
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.two_level import checkpoint_in_two_levels
from tests.support.any_type import batch_of, tiny
from tests.support.reversible_models import CLAIMED, inputs_of, model_of, reversible_of, step
from tests.support.reversible_removal import same_state, state_of
from tests.support.tolerances import NOTICED, RELATIVE
from tests.support.twin import worst_difference


def model_and_batch(name, **changed):
    model = model_of(name, **{"dropout": 0.1, **({"sliding_window": 16} if name == "gemma2" else {}), **changed})
    return model, inputs_of(name, model)


def assert_same_step(found, expected):
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    unequal = [name for name in expected[1] if not torch.equal(found[1][name], expected[1][name])]
    assert not unequal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLAIMED)
def test_gradients_are_those_of_plain_training(name, dtype):
    model, batch = model_and_batch(name, dtype=dtype)
    plain = step(model, batch)
    checkpoint_in_two_levels(model)
    found = step(model, batch)
    if name in ("bart", "t5", "t5-gated"):  # sums over the layers of a decoder, in another order
        assert torch.equal(found[0], plain[0]) and worst_difference(found[1], plain[1]) <= RELATIVE[dtype]
    else:
        assert_same_step(found, plain)


def test_other_random_numbers_are_noticed():
    model, batch = model_and_batch("bert")
    plain = step(model, batch)
    checkpoint_in_two_levels(model)
    assert worst_difference(step(model, batch, seed=6)[1], plain[1]) > NOTICED


@pytest.mark.parametrize("segment_layers", [0, -1])
def test_segments_without_layers_are_refused(segment_layers):
    model, _ = model_and_batch("llama")
    with pytest.raises(ConfigError, match="segment_layers: got .*expected 1 or more"):
        checkpoint_in_two_levels(model, segment_layers)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("segment_layers", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("depth", [2, 5, 9])
def test_every_length_of_segment(depth, segment_layers):
    model, batch = model_and_batch("llama", num_hidden_layers=depth)
    plain = step(model, batch)
    checkpoint_in_two_levels(model, segment_layers)
    assert_same_step(step(model, batch), plain)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_lora_and_autocast(name, targets, autocast):
    model, batch = model_and_batch(name, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.1, init_lora_weights=False))
    plain = step(adapted, batch, autocast=autocast)
    handle = checkpoint_in_two_levels(adapted)
    assert_same_step(step(adapted, batch, autocast=autocast), plain)
    handle.restore()
    assert_same_step(step(adapted, batch, autocast=autocast), plain)


def test_two_forwards_and_a_graph_that_is_kept():
    model, batch = model_and_batch("llama", dropout=0.0)
    plain = step(model, batch)[1]
    checkpoint_in_two_levels(model)
    parameter = model.model.layers[0].mlp.up_proj.weight
    loss = model(**batch).loss + model(**batch).loss
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, [parameter], retain_graph=True)
        expected = plain["model.layers.0.mlp.up_proj.weight"]
        assert (found - 2 * expected).norm() <= RELATIVE[torch.float64] * expected.norm()


def test_hidden_states_in_the_middle_can_be_used():
    model, batch = model_and_batch("llama", dropout=0.0)

    def gradient():
        loss = model(**batch, output_hidden_states=True).hidden_states[2].square().sum()
        return torch.autograd.grad(loss, [model.model.layers[0].mlp.up_proj.weight])[0]

    plain = gradient()
    checkpoint_in_two_levels(model)
    assert torch.equal(gradient(), plain)


def bent(module, args, output):
    return (output[0].sin(), *output[1:]) if isinstance(output, tuple) else output.sin()


def bent_in_place(module, args, output):
    (output[0] if isinstance(output, tuple) else output).sin_()


def bent_before(module, args):
    return args[0].sin(), *args[1:]


def doubled(module, gradients, arriving):
    return tuple(2 * each if each is not None and each.is_floating_point() else each for each in gradients)


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(bent),
    "forward, in place": lambda layer: layer.register_forward_hook(bent_in_place),
    "forward-pre": lambda layer: layer.register_forward_pre_hook(bent_before),
    "full backward": lambda layer: layer.register_full_backward_hook(doubled),
    "full backward-pre": lambda layer: layer.register_full_backward_pre_hook(lambda module, gradients: doubled(module, gradients, None)),
}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_change_what_goes_from_layer_to_layer(hook, name, number):
    model, batch = model_and_batch(name, dropout=0.0, **({} if name == "bart" else {"num_hidden_layers": 4}))
    layers = model.base_model.decoder.layers if name == "bart" else model.base_model.h if name == "gpt2" else model.model.layers
    without = step(model, batch)
    HOOKS[hook](layers[number % len(layers)])
    plain = step(model, batch)
    handle = checkpoint_in_two_levels(model)
    assert worst_difference(step(model, batch)[1], plain[1]) <= RELATIVE[torch.float64]
    assert worst_difference(without[1], plain[1]) > NOTICED  # and a hook that is left out is noticed
    handle.restore()


PUT_ON = [checkpoint_in_two_levels, lambda model: reversible_of(model, "centred", "exact", adapter_rank=0)]


@pytest.mark.parametrize("put_on", PUT_ON)
def test_hooks_of_parameters_fire_once_with_the_whole_gradient(put_on):
    model, batch = model_and_batch("llama", dropout=0.0)
    put_on(model)
    plain, seen, several = step(model, batch)[1], {}, []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.setdefault(name, []).append(gradient.clone()) or 2 * gradient)
    torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), several.append)
    doubled = step(model, batch)[1]
    for name, gradient in plain.items():
        assert len(seen[name]) == 1 and torch.equal(seen[name][0], gradient) and torch.equal(doubled[name], 2 * gradient)
    assert len(several) == 1 and worst_difference(doubled, plain) > NOTICED
    step(model, batch)
    assert all(len(each) == 2 for each in seen.values())


@pytest.mark.parametrize("put_on", PUT_ON)
def test_an_encoder_that_nothing_attends_to_has_no_gradient(put_on):
    """And not one of zeros, which weight decay would act on."""
    model, batch = model_and_batch("bart", dropout=0.0)
    put_on(model)
    attended = step(model, batch)[1]
    for layer in model.model.decoder.layers:
        layer.encoder_attn.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), None))
    found = step(model, batch)[1]
    inside = {name for name in attended if "encoder.layers" in name or "encoder_attn." in name}
    assert inside and found.keys() == attended.keys() - inside - {name for name in attended if "model.encoder." in name}


def test_hooks_that_record_see_what_they_see_in_plain_training_and_cost_nothing():
    model, batch = model_and_batch("llama", dropout=0.0, num_hidden_layers=9)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].detach().clone()), with_kwargs=True)
    plain = step(model, batch)
    expected = seen.copy()
    seen.clear()
    checkpoint_in_two_levels(model)
    assert_same_step(step(model, batch), plain)
    assert len(seen) == 18 and all(map(torch.equal, seen, expected))


def with_hook(hook, put_on=None, name="llama", **changed):
    model, batch = model_and_batch(name, dropout=0.0, **changed)
    model.kept, layer = [], model.model.layers[1]
    layer.mlp.register_forward_hook(hook(model, layer))
    if put_on is not None:
        put_on(model)
    return model, batch


@pytest.mark.parametrize("put_on", PUT_ON)
@pytest.mark.parametrize("asked_for", [None, "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_an_activation_that_a_hook_keeps_is_refused_in_the_loss_and_nowhere_else(asked_for, put_on):
    model, batch = with_hook(lambda model, layer: lambda module, args, output: model.kept.append(output), put_on)
    model(**batch).loss.backward()
    model.kept.clear()
    loss = model(**batch).loss + model.kept[0].square().mean()
    with pytest.raises(InverseError, match=r"model\.layers\.1: the loss depends on something from inside of this layer"):
        loss.backward() if asked_for is None else torch.autograd.grad(loss, [model.get_parameter(asked_for)])


# transformers 5.23 has a new name for it; both work
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_the_remedy_for_an_activation_in_the_loss():
    found = []
    for put_on in (None, lambda model: model.gradient_checkpointing_enable()):
        model, batch = with_hook(lambda model, layer: lambda module, args, output: model.kept.append(output), put_on)
        (model(**batch).loss + model.kept[0].square().mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert worst_difference(*found) <= RELATIVE[torch.float64]


def test_an_activation_that_nothing_before_it_learns_from_is_right():
    def frozen(model):
        for part in (model.model.embed_tokens, model.model.layers[0]):
            part.requires_grad_(False)

    def put_on(model):
        frozen(model)
        checkpoint_in_two_levels(model)

    found = []
    for put in (frozen, put_on):
        model, batch = with_hook(lambda model, layer: lambda module, args, output: model.kept.append(output), put)
        (model(**batch).loss + model.kept[0].square().mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert worst_difference(*found) <= RELATIVE[torch.float32]  # norms, which are in float32, are gone through twice


def adds(what):
    return lambda model, layer: lambda module, args, output: output + what(model, layer)


@pytest.mark.parametrize("put_on", PUT_ON)
def test_something_learned_that_is_no_parameter_of_the_layer_is_refused(put_on):
    vector = torch.randn(32, dtype=torch.float64, requires_grad=True)
    for what in (
        lambda model, layer: vector,
        lambda model, layer: 2 * vector,
        lambda model, layer: model.model.layers[0].mlp.down_proj.weight[:, 0],
    ):
        model, batch = with_hook(adds(what), put_on)
        with pytest.raises(
            UnsupportedModelError, match=r"model\.layers\.1: what it returns depends on a tensor of shape \(32.*nn.Parameter"
        ):
            model(**batch)
    model, batch = with_hook(adds(lambda model, layer: model.kept[0]), put_on)
    model.model.layers[0].requires_grad_(False).mlp.register_forward_hook(lambda module, args, output: model.kept.append(output))
    with pytest.raises(UnsupportedModelError, match="what was computed inside of another layer"):
        model(**batch)


@pytest.mark.parametrize("registered", [True, False])
def test_what_a_hook_uses_may_be_a_parameter_of_the_layer_or_a_constant(registered):
    def vector_of(model, layer):
        if "vector" not in dict(layer.mlp.named_parameters()) and registered:
            layer.mlp.register_parameter("vector", torch.nn.Parameter(torch.ones(32, dtype=torch.float64)))
        return layer.mlp.vector if registered else layer.mlp.down_proj.weight[:, 0] + torch.ones(32)

    def hook(model, layer):
        vector_of(model, layer)
        return adds(vector_of)(model, layer)

    steps = [step(*with_hook(hook, put_on)) for put_on in (None, checkpoint_in_two_levels)]
    assert_same_step(*steps)


@pytest.mark.parametrize("put_on", PUT_ON)
def test_a_leaf_that_the_layer_makes_itself_is_no_such_thing(put_on):
    """As in the attention of MRA."""
    model, batch = with_hook(lambda model, layer: lambda module, args, output: output + torch.zeros_like(output).requires_grad_(), put_on)
    model(**batch).loss.backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in model.model.layers[1].mlp.parameters())


@pytest.mark.parametrize("put_on", PUT_ON)
def test_router_logits_are_refused_in_the_call(put_on):
    model, batch = model_and_batch("mixtral", dropout=0.0)
    put_on(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: got output_router_logits=True"):
        model(**batch, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(UnsupportedModelError, match=r"layers\.0: got output_router_logits=True"):
        model(**batch)
    model(**batch, output_router_logits=False).loss.backward()


@pytest.mark.parametrize("put_on", PUT_ON)
def test_attention_weights_that_are_asked_for_later_are_refused_in_a_loss(put_on):
    model, batch = model_and_batch("llama", dropout=0.0)
    put_on(model)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    output = model(**batch)
    output.loss.backward()
    with pytest.raises(InverseError, match="attention weights"):
        model(**batch).attentions[1].square().sum().backward()


def test_nothing_is_left():
    model, batch = model_and_batch("t5")
    before = state_of(model)
    handle = checkpoint_in_two_levels(model)
    assert not same_state(state_of(model), before)
    step(model, batch)
    handle.restore()
    handle.restore()
    assert same_state(state_of(model), before)


@pytest.mark.parametrize("put_on", PUT_ON)
def test_a_forward_that_was_put_over_ours_stays_and_ours_does_not_come_back(put_on):
    model, batch = model_and_batch("llama")
    plain, layers, seen = step(model, batch), model.model.layers, []

    class Seen(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    handle = put_on(model)
    for layer in layers:
        add_hook_to_module(layer, Seen())
    handle.restore()
    assert_same_step(step(model, batch), plain)
    assert seen == list(layers)
    for layer in layers:
        remove_hook_from_module(layer)
    assert_same_step(step(model, batch), plain)
    assert all(override_of(layer) is None for layer in layers)
    again = put_on(model)
    assert override_of(layers[0]) is not None
    again.restore()
    assert_same_step(step(model, batch), plain)


def test_a_copy_and_a_dropped_handle():
    model, batch = model_and_batch("bert")
    plain = step(model, batch)
    checkpoint_in_two_levels(model)
    gc.collect()
    assert "forward" in vars(model.bert.encoder.layer[0])
    assert_same_step(step(copy.deepcopy(model), batch), plain)


def test_generation_uses_its_cache():
    model, batch = model_and_batch("llama", dtype=torch.float32)
    model.eval()
    plain = model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False)
    checkpoint_in_two_levels(model)
    assert torch.equal(model.generate(batch["input_ids"][:1, :5], max_new_tokens=6, do_sample=False), plain)


def test_states_of_recurrent_layers_alone_are_left_out_as_caches_are():
    """Outside of training such a model makes a cache that counts no tokens."""
    model = tiny("mamba", "causal").eval()
    batch = batch_of(model, "causal")
    plain = step(model, batch)
    checkpoint_in_two_levels(model)
    assert worst_difference(step(model, batch)[1], plain[1]) <= RELATIVE[torch.float64]  # states of a cache are added up in another order
    with torch.no_grad():
        filled = model(batch["input_ids"]).cache_params
    with pytest.raises(UnsupportedModelError, match="got a cache"):
        model(batch["input_ids"][:, :1], cache_params=filled)


def test_refusals():
    model, batch = model_and_batch("bert")
    handle = checkpoint_in_two_levels(model)
    for other in (checkpoint_in_two_levels, lambda model: reversible_of(model, "centred")):
        with pytest.raises(UnsupportedModelError, match="already"):
            other(model)
    loss = model(**batch).loss
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(InverseError, match="changed in place"):
        loss.backward()
    loss = model(**batch).loss
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(InverseError, match="was frozen between"):
        loss.backward()
    handle.restore()
    with pytest.raises(UnsupportedModelError, match="layerdrop"):
        checkpoint_in_two_levels(model_of("opt", layerdrop=0.1))


def lora(name="llama", **changed):
    model, batch = model_and_batch(name, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **changed))
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return adapted.train(), batch


CHANGES = {
    "training": lambda model: model.eval(),
    "a parameter was frozen": lambda model: model.set_adapter("other"),
    "_active_adapter": lambda model: [m.set_adapter(["default", "other"]) for m in model.modules() if hasattr(m, "scale_layer")],
    "merged_adapters": lambda model: model.merge_adapter(),
    "scaling": lambda model: [m.scale_layer(0.5) for m in model.modules() if hasattr(m, "scale_layer")],
    "_attn_implementation": lambda model: model.base_model.model.set_attn_implementation("eager"),
    "forward hooks": lambda model: model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *given: None),
}


@pytest.mark.parametrize("put_on", PUT_ON)
@pytest.mark.parametrize("named", CHANGES)
def test_a_layer_that_changes_between_a_call_and_its_backward_is_noticed(named, put_on):
    model, batch = lora()
    put_on(model)
    loss = model(**batch).loss
    CHANGES[named](model)
    with pytest.raises(InverseError, match=named):
        loss.backward()


def test_a_change_that_is_taken_back_before_backward_changes_nothing():
    model, batch = lora(lora_dropout=0.1)
    plain = step(model, batch)
    checkpoint_in_two_levels(model)

    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model.eval()(**batch)
    model.train()
    loss.backward()
    assert_same_step((plain[0], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), plain)


def live_bytes(depth, how, dtype=torch.float32):
    """Alive after the forward of the body, and at the peak of a step; and elements of the hidden states."""
    model = model_of("llama", dtype=dtype, num_hidden_layers=depth)
    batch = {key: value for key, value in inputs_of("llama", model, length=12).items() if key != "labels"}
    if how == "two levels":
        checkpoint_in_two_levels(model)
    elif how == "checkpointed":
        model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        output = model.base_model(**batch)[0]
        after = live.current_bytes
        output.sum().backward()
    return after, live.peak_bytes, output.numel()


# transformers 5.23 has a new name for it; both work
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    one = live_bytes(36, "checkpointed", dtype)
    two = live_bytes(36, "two levels", dtype)
    plain = live_bytes(36, "plain", dtype)
    element = dtype.itemsize * one[2]
    # of 36 inputs, 6 are kept after forward, and at the peak 6 more, with the gradient of one and what a second run needs
    assert one[0] - two[0] == 30 * element
    assert one[1] - two[1] >= 20 * element
    assert plain[0] > 4 * one[0] and plain[1] > 4 * two[1]
