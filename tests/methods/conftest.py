"""Fixtures of more than one test file of the methods."""

import pytest
import torch
import transformers as tf


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
