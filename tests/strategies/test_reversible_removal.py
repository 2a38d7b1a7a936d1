"""Reversible layers leave no trace, and refuse, before anything is changed, what they cannot do."""

import gc

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from hf_memtune import ConfigError, InverseError, MemTuneError, ReversibleConfig, StreamOverflowError, UnsupportedModelError
from hf_memtune.strategies.reversible import make_reversible
from tests.strategies.reversible_models import CLAIMED, COUPLINGS, PARALLEL, inputs_of, model_of, reversible_of, settings, step
from tests.strategies.tiny_models import tiny_model
from tests.strategies.twin import worst_difference
from tests.tolerances import NOTICED


def state_of(model):
    """Everything of a model that could be left changed."""
    modules = {
        name: (
            sorted(key for key in vars(m) if key != "_output_capturing_hooks_installed"), m.training,
            len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules),
        )
        for name, m in model.named_modules()
    }  # fmt: skip
    parameters = {name: (p.requires_grad, p.detach().clone(), id(p)) for name, p in model.named_parameters()}
    return modules, parameters


def same_state(found, expected):
    if found[0] != expected[0] or found[1].keys() != expected[1].keys():
        return False
    return all(
        found[1][name][0::2] == before[0::2] and torch.equal(found[1][name][1], before[1]) for name, before in expected[1].items()
    )


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", [name for name in CLAIMED if name not in PARALLEL])
def test_nothing_is_left(name, coupling):
    model = model_of(name, **({"sliding_window": 16} if name == "gemma2" else {}))  # past the padding: float64 in eager attention
    batch = inputs_of(name, model)
    model.bert.embeddings.requires_grad_(False) if name == "bert" else None
    before, plain = state_of(model), step(model, batch)
    handle = reversible_of(model, coupling, "exact")
    assert not same_state(state_of(model), before)
    assert worst_difference(step(model, batch)[1], plain[1]) > NOTICED
    handle.verify(batch)
    handle.restore()
    handle.restore()
    assert same_state(state_of(model), before)
    after = step(model, batch)
    assert torch.equal(after[0], plain[0]) and all(torch.equal(after[1][key], plain[1][key]) for key in plain[1])


def test_a_handle_that_is_dropped_leaves_the_layers_reversible():
    model = model_of("bert")
    batch = inputs_of("bert", model)
    plain = step(model, batch)[1]
    reversible_of(model, "centred")
    gc.collect()
    assert worst_difference(step(model, batch)[1], plain) > NOTICED


def test_names_of_the_base_model_stay():
    model = model_of("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    reversible_of(model, "meft1")
    after = model.state_dict()
    assert before.keys() <= after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(".reversible_adapters." in name for name in after.keys() - before.keys())


def test_off_is_the_model_as_it_was():
    model = model_of("gpt2").eval()
    batch = inputs_of("gpt2", model)
    plain = model(**batch).logits
    handle = reversible_of(model, "meft3")
    changed = model(**batch).logits
    with handle.off():
        assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model(**batch).logits, changed) and not torch.equal(changed, plain)


def test_a_failure_while_putting_in_leaves_nothing(monkeypatch):
    from hf_memtune.strategies import reversible

    def fail(*args):
        raise RuntimeError("on purpose")

    model = model_of("bert")
    before = state_of(model)
    monkeypatch.setattr(reversible, "freeze_but", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        reversible_of(model, "meft1")
    assert same_state(state_of(model), before)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_was_trained_goes_from_one_model_to_another(name, coupling):
    first, second = model_of(name), model_of(name)
    batch = inputs_of(name, first)
    one, two = (reversible_of(model, coupling, "exact") for model in (first, second))
    assert one.adapters.keys() <= one.trained.keys() and ("classifier.weight" in one.trained) == (name == "vit")
    for value in one.trained.values():
        value.add_(torch.randn_like(value))
    assert not torch.equal(step(first, batch)[0], step(second, batch)[0])
    two.load(one.trained)
    assert torch.equal(step(first, batch)[0], step(second, batch)[0])


def test_tensors_that_do_not_match_change_nothing():
    model = model_of("bert")
    handle = reversible_of(model, "meft1")
    state = {name: value.clone() + 1 for name, value in handle.trained.items()}
    for wrong in ({**state, "more": torch.zeros(1)}, dict(list(state.items())[1:]), {n: v[..., :1] for n, v in state.items()}):
        with pytest.raises(MemTuneError, match="do not match"):
            handle.load(wrong)
    assert all(torch.equal(value + 1, state[name]) for name, value in handle.trained.items())


# --- what trains


@pytest.mark.parametrize(
    "name, changed, outside",
    [
        ("llama", {}, set()),
        ("llama", {"train_head": True}, {"lm_head.weight"}),
        ("vit", {}, {"classifier.weight", "classifier.bias"}),
        ("vit", {"train_head": False}, set()),
        ("bert", {}, set()),
    ],
)
def test_adapters_and_the_head_train(name, changed, outside):
    model = model_of(name)
    handle = reversible_of(model, "meft1", **changed)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == outside | set(handle.adapters)


def test_the_pooler_is_part_of_the_head():
    model = tiny_model("bert", "sequence_classification")
    reversible_of(model, "meft1")
    trained = {key.split(".reversible")[0] for key, p in model.named_parameters() if p.requires_grad and "reversible" not in key}
    assert trained == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}


@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_adapters_are_not_in_half_precision(dtype, wanted):
    model = model_of("llama", dtype=dtype)
    handle = reversible_of(model, "meft1", adapter_init_std=0.5)
    assert {value.dtype for value in handle.adapters.values()} == {wanted}
    weights = [value for name, value in handle.adapters.items() if name.endswith("weight")]
    assert torch.cat([w.flatten() for w in weights]).std() == pytest.approx(0.5, rel=0.1)
    assert all(not value.any() for name, value in handle.adapters.items() if name.endswith("bias"))


# --- refusals


def refused(model, coupling="centred", match=None, **changed):
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=match):
        reversible_of(model, coupling, **changed)
    assert same_state(state_of(model), before)


@pytest.mark.parametrize("name, key", [("opt", "layerdrop"), ("bart", "encoder_layerdrop"), ("bart", "decoder_layerdrop")])
def test_layerdrop_is_refused(name, key):
    refused(model_of(name, **{key: 0.1}), match=f"{key}=0.1: layers are left out at random")


def test_router_losses_are_refused():
    refused(model_of("mixtral", output_router_logits=True), match="auxiliary loss of its routers")


def test_attention_weights_are_refused():
    refused(model_of("bert", attn_implementation="eager", output_attentions=True), match="output_attentions=True")
    model = model_of("llama", attn_implementation="eager")
    reversible_of(model, "centred")
    with pytest.raises(UnsupportedModelError, match="without a gradient"):
        model(**inputs_of("llama", model), output_attentions=True)


@pytest.mark.parametrize("name", ["gpt_neox", "cohere2"])
def test_parallel_blocks_are_refused_for_meft3_alone(name):
    refused(model_of(name), "meft3", match="beside each other")
    reversible_of(model_of(name), "meft1")


@pytest.mark.parametrize("changed, match", [({"num_hidden_layers": 1}, "no stack of two"), ({"reversible_layers": 4}, "expected 2 to 3")])
def test_too_few_layers_are_refused(changed, match):
    of_model = {key: value for key, value in changed.items() if key.startswith("num")}
    refused(model_of("llama", **of_model), match=match, **{key: value for key, value in changed.items() if key not in of_model})


def test_a_model_on_several_devices_is_refused():
    model = model_of("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    refused(model, match="spread over 0, cpu")


def test_an_unknown_layout_is_refused_for_adapters_alone():
    refused(model_of("modernbert"), match="is laid out is not known")
    reversible_of(model_of("modernbert"), "centred", adapter_rank=0)


def test_one_layer_in_two_places_is_refused():
    model = model_of("llama")
    model.model.layers[2] = model.model.layers[0]
    refused(model, match="several places")


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


def test_prefix_tuning_is_refused():
    adapted = get_peft_model(model_of("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    reversible_of(adapted, "centred", adapter_rank=0)
    batch = {key: value for key, value in inputs_of("llama", adapted).items() if key != "use_cache"}
    with pytest.raises(UnsupportedModelError, match="cache with 3 tokens"):
        adapted(**batch)


def test_something_between_the_layers_is_refused():
    model = model_of("llama")
    reversible_of(model, "centred")
    first, second = model.model.layers[0], model.model.layers[1]
    model.model.layers[0], model.model.layers[1] = second, first
    with pytest.raises(UnsupportedModelError, match="was not given what the layer before it returned"):
        model(**inputs_of("llama", model))


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
        with mode(), pytest.raises(StreamOverflowError, match=r"model.layers.1: its output reaches .* reversible_fraction_bits to \d+ or less"):
            model(**batch)


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


