"""Reversible layers with everything else: LoRA, 4-bit weights, frozen parts, autocast, checkpointing, generation."""

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from hf_memtune.methods.reversible.adapters import ADAPTERS
from tests.support.reversible_exactness import FLOAT32_NORMS, assert_equal_steps, both_steps, model_and_batch
from tests.support.reversible_models import (
    COUPLINGS,
    inputs_of,
    model_of,
    reversible_of,
    step,
    twin,
)
from tests.support.tiny_models import batch_for, tiny_model
from tests.support.tolerances import NOTICED, close, tolerance
from tests.support.twin import worst_difference


@pytest.mark.parametrize("numerics", ["float", "exact"])
@pytest.mark.parametrize("name", ["llama", "bart", "t5", "gpt2"])
def test_everything_trains_where_there_are_no_adapters(name, numerics):
    model, batch = model_and_batch(name)
    changed = {"reversible_scale": 0.5} if numerics == "float" else {}
    handle = reversible_of(model, "centred", numerics, adapter_rank=0, **changed)
    (_, found), (_, expected) = both_steps(model, batch, handle)
    assert set(found) == {key for key, p in model.named_parameters() if p.requires_grad}
    assert worst_difference(found, expected) <= tolerance(torch.float64, name in FLOAT32_NORMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("t5", ["q", "wo"])])
def test_lora_inside_the_layers(name, targets, dtype):
    model, batch = model_and_batch(name, dtype=dtype)
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=0.1, init_lora_weights=False))
    handle = reversible_of(adapted, "centred", "exact", adapter_rank=0)
    ours, theirs = both_steps(adapted, batch, handle)
    assert_equal_steps(ours, theirs)
    assert ours[1] and all("lora_" in key for key in ours[1])
    handle.restore()
    assert worst_difference(step(adapted, batch)[1], ours[1]) > NOTICED


def test_adapters_beside_lora_leave_it_trainable():
    model, batch = model_and_batch("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    handle = reversible_of(adapted, "centred", "exact")
    ours, theirs = both_steps(adapted, batch, handle)
    assert_equal_steps(ours, theirs)
    assert {"lora_" in key for key in ours[1]} == {True, False}


def test_a_head_that_peft_trains_a_copy_of_stays_frozen_itself():
    """What requires grad and never gets one would hold up distributed training."""
    model = tiny_model("bert", "sequence_classification")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False))
    reversible_of(adapted, "centred")
    learned = step(adapted, batch_for(model, "sequence_classification"))[1]
    assert learned.keys() == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in name for name in learned)


@pytest.mark.parametrize("coupling", ["centred", "meft1", "meft3"])
def test_adapters_beside_experts(coupling):
    """An MLP of experts returns what its router found, too (gpt-oss)."""
    model, batch = model_and_batch("gpt-oss")
    handle = reversible_of(model, coupling, "exact")
    ours, theirs = both_steps(model, batch, handle)
    assert_equal_steps(ours, theirs)
    assert ours[1] and all(ADAPTERS in name and gradient.norm() > 0 for name, gradient in ours[1].items())


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_adapters_in_four_bit_layers(tmp_path, coupling):
    pytest.importorskip("bitsandbytes")
    model_of("llama", dtype=torch.float32).save_pretrained(tmp_path)
    quantised = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32).train()
    handle = reversible_of(model, coupling, "exact")
    ours, theirs = both_steps(model, inputs_of("llama", model), handle)
    assert_equal_steps(ours, theirs)
    assert all("reversible_adapters" in key for key in ours[1])


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_frozen_embeddings_lose_no_gradient(name):
    model, batch = model_and_batch(name)
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    handle = reversible_of(model, "centred", "exact", adapter_rank=0)
    assert_equal_steps(*both_steps(model, batch, handle))


@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_lower_layers(frozen):
    model, batch = model_and_batch("llama", num_hidden_layers=4)
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[:frozen]:
        layer.requires_grad_(False)
    handle = reversible_of(model, "centred", "exact", adapter_rank=0)
    ours, theirs = both_steps(model, batch, handle)
    assert_equal_steps(ours, theirs)
    assert not any(f"layers.{frozen - 1}." in key for key in ours[1])


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_part_of_the_stack(name, coupling):
    """The layers above keep ordinary gradients, and adapters of their own."""
    model, batch = model_and_batch(name)
    handle = reversible_of(model, coupling, "exact", reversible_layers=2)
    ours, theirs = both_steps(model, batch, handle)
    assert_equal_steps(ours, theirs)
    assert {key.split("reversible_adapters")[0][-2] for key in ours[1] if "adapters" in key} == {"0", "1", "2"}
    assert set(ours[1]) == {key for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("numerics", ["float", "exact"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_accumulation_and_two_forwards_before_one_backward(name, numerics):
    model, batch = model_and_batch(name)
    other = inputs_of(name, model, rows=2, length=6)
    handle = reversible_of(model, "centred", numerics, reversible_scale=0.5)

    def accumulated(together):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        if together:
            (model(**batch).loss + model(**other).loss).backward()
        else:
            for inputs in (batch, other):
                model(**inputs).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with twin(handle):
        expected = accumulated(together=False)
    for together in (True, False):
        assert worst_difference(accumulated(together), expected) <= tolerance(torch.float64, name in FLOAT32_NORMS)
    assert worst_difference(step(model, batch)[1], expected) > NOTICED


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_autocast(name, coupling):
    model, batch = model_and_batch(name, dtype=torch.float32)
    handle = reversible_of(model, coupling, "exact")
    ours, theirs = both_steps(model, batch, handle, autocast=torch.bfloat16)
    assert_equal_steps(ours, theirs)
    assert worst_difference(step(model, batch)[1], ours[1]) > NOTICED  # full precision is something else


def test_backward_inside_of_autocast():
    model, batch = model_and_batch("llama", dtype=torch.float32)
    handle = reversible_of(model, "centred", "exact")
    assert_equal_steps(*both_steps(model, batch, handle, autocast=torch.bfloat16, backward_autocast=True))


# transformers 5.23 has a new name for it; both work
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_that_is_on_stays_out_of_the_way(name):
    model, batch = model_and_batch(name)
    handle = reversible_of(model, "meft1", "exact", reversible_layers=2)
    plain = step(model, batch)
    model.gradient_checkpointing_enable()
    assert_equal_steps(step(model, batch), plain)
    assert handle.verify(batch).is_exact


def test_hidden_states_are_the_newest_stream():
    model, batch = model_and_batch("llama", dropout=0.0)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    handle = reversible_of(model, "centred", "float", adapter_rank=0, reversible_scale=0.25)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == 4 and torch.equal(hidden[0], embedded)
    handle.restore()
    layers, newest, older = model.model.layers, embedded, embedded
    seen = {"position_embeddings": model.model.rotary_emb(embedded, torch.arange(embedded.shape[1])[None])}
    seen["attention_mask"] = causal_and_padded(batch["attention_mask"], embedded.dtype)
    for layer, state in zip(layers[:-1], hidden[1:-1]):  # the last one is what the norm makes of it
        newest, older = 0.25 * older + 1.25 * layer(newest, **seen) - 0.5 * newest, newest
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(state[real], newest[real], **close(torch.float64))
        assert (state[real] - older[real]).abs().max() > NOTICED


def causal_and_padded(mask, dtype):
    """(B, 1, T, T): -inf where a key comes later, or is padding."""
    length = mask.shape[1]
    sees = torch.ones(length, length).tril().bool() & mask[:, None, None, :].bool()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5", "gemma3"])
def test_generation_with_a_cache_gives_the_tokens_without(name, coupling):
    model, batch = model_and_batch(name, dtype=torch.float32)
    reversible_of(model, coupling, "exact")
    model.eval()
    ids = batch["input_ids"][:1, :5]
    tokens = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_evaluation_computes_the_same(name):
    model, batch = model_and_batch(name)
    reversible_of(model, "meft1", "exact")
    model.eval()
    expected = model(**batch).logits.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model.train()(**batch).logits, expected)


def test_a_copy_is_reversible_by_itself():
    model, batch = model_and_batch("bert")
    handle = reversible_of(model, "meft1", "exact")
    twice = copy.deepcopy(model)
    before = step(twice, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert_equal_steps(step(twice, batch), before)
    assert worst_difference(step(model, batch)[1], before[1]) > NOTICED
    handle.restore()
    assert_equal_steps(step(twice, batch), before)
