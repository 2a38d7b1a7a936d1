"""What the tests of composition share with others."""

import copy

import peft
import pytest
import torch
import transformers as tf

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])


def with_lora(model, targets="all-linear", seed=5, **settings):
    """Random adapters: with the usual zero one, half of the gradients would be zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


@pytest.fixture(scope="module")
def quantised_llama(tmp_path_factory):
    """A tiny checkpoint, loaded as a user loads one for QLoRA: NF4 weights, computing in float32 or bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)

    def load(dtype):
        pytest.importorskip("bitsandbytes")
        settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map="cpu").train()

    return load


def whole_error(found, expected):
    """Relative error of the gradient as one vector: in half precision single parameters may be all rounding."""
    assert found.keys() == expected.keys()
    distance = sum((found[name].double() - g.double()).square().sum() for name, g in expected.items())
    return float((distance / sum(g.double().square().sum() for g in expected.values())).sqrt())


def checkpointed(model, reentrant):
    """A copy with activation checkpointing on."""
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model
