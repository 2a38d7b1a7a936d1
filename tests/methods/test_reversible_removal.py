"""Reversible layers leave no trace, and train what they should."""

import gc

import pytest
import torch

from hf_memtune import MemTuneError
from hf_memtune.methods.reversible.handle import make_reversible
from tests.support.reversible_models import CLAIMED, COUPLINGS, PARALLEL, inputs_of, model_of, reversible_of, settings, step
from tests.support.reversible_removal import same_state, state_of
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import NOTICED
from tests.support.twin import worst_difference


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
    from hf_memtune.methods.reversible import handle

    def fail(*args):
        raise RuntimeError("on purpose")

    model = model_of("bert")
    before = state_of(model)
    monkeypatch.setattr(handle, "freeze_but", fail)
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_the_embeddings_is_not_trained_and_that_is_said(tied, recwarn):
    model = model_of("llama", tie_word_embeddings=tied)
    handle = make_reversible(model, settings("centred", "exact", train_head=True))
    said = [str(each.message) for each in recwarn if "train_head" in str(each.message)]
    assert [message.startswith("train_head has no effect with LlamaForCausalLM") for message in said] == [True] * tied
    assert ("lm_head.weight" in handle.trained) is not tied


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
