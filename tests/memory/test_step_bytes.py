"""The memory of a training step, in bytes: exact for a tiny model, bounded for the true shapes of a large one."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from hf_memtune import SavedBytes, StreamingConfig, TokenSeekingConfig
from hf_memtune.memory.shapes import SHAPES
from hf_memtune.units import MIB
from tests.support.causal_lm_step import MODULE, trace_causal_lm_step
from tests.support.stepping import PUBLISHED, seeking_on
from tests.support.tiny_models import batch_for, tiny_model

TOKENS = 40
# What the tiny Llama (3 layers, hidden 32, MLP 48, 4 heads and 2 key heads of 8, float32) saves for one token of the focus pass.
SAVED_PER_TOKEN = (
    23 * 32 * 4  # hidden states: 7 norms twice (input, normalised), inputs of attention output and of residual sums, the head's
    + 12 * 48 * 4  # MLP: gate, activation, up and their product, in 3 layers
    + 3 * 4 * 8 * 4  # queries
    + 6 * 2 * 8 * 4  # live keys and values
    + 7 * 4  # one reciprocal root mean square for each norm
    + 2 * 8 * 4  # rotary cosine and sine
    + 8 + 1  # its id, and whether it is labelled
)  # fmt: skip
SAVED_PER_LABEL = 32 * 4  # the gradient of what the head is given, made in forward
SAVED_PER_STEP = 8 + 4 + 61 * 32 * 4  # how many labels, and what they are over the kept ones; the gradient of the head, made in forward


def saved_bytes(model, ratio=None, holds_outputs=False):
    """Of one call, its loss alive; holds_outputs: and all that the model returned."""
    batch = batch_for(model, "causal_lm", lengths=(TOKENS,))
    with nullcontext() if ratio is None else seeking_on(model, token_ratio=ratio), SavedBytes(exclude=model) as saved:
        outputs = model(**batch, use_cache=False)
        loss = outputs.loss
        if not holds_outputs:
            del outputs
    assert loss.requires_grad  # alive, and with it what it saved
    return saved.current_bytes


@pytest.mark.parametrize("ratio, kept, labelled", [(0.1, 4, 4), (0.5, 20, 20), (0.975, 39, 39)])
def test_saved_bytes_are_those_of_the_kept_tokens(ratio, kept, labelled):
    model = tiny_model("llama", dtype=torch.float32)
    assert saved_bytes(model, ratio) == SAVED_PER_TOKEN * kept + SAVED_PER_LABEL * labelled + SAVED_PER_STEP


def test_who_holds_the_outputs_holds_the_hidden_states_of_all_tokens():
    """Logits, were they wanted, would be made of them; the logits themselves take nothing."""
    model = tiny_model("llama", dtype=torch.float32)
    assert saved_bytes(model, 0.1, holds_outputs=True) - saved_bytes(model, 0.1) == TOKENS * 32 * 4


def test_plain_training_saves_more_than_keeping_nearly_every_token():
    """The sibling: the count does tell two steps apart. Plain training saves its logits as well."""
    model = tiny_model("llama", dtype=torch.float32, vocab_size=1024)
    assert saved_bytes(model) > saved_bytes(model, 0.975)


@cache
def promised(tokens) -> int:
    """The peak of Llama-3.2-1B in bf16, LoRA on all linears, one row, a tenth of the tokens, activation checkpointing."""
    seeking = TokenSeekingConfig(token_seeking=True, token_ratio=0.1, **PUBLISHED)
    return trace_causal_lm_step(SHAPES["Llama-3.2-1B"](), tokens, checkpointing=True, strategy=seeking).peak_bytes


def test_llama_1b_with_lora_keeps_its_promise():
    """Above weights and optimizer state; for 2048 tokens, and for 8192 by what each further token needs."""
    assert promised(2048) <= 230 * MIB
    assert promised(2048) + 12 * (promised(2560) - promised(2048)) <= 800 * MIB


def test_the_trace_sees_what_plain_training_needs():
    """The sibling: the same trace of the best rival exceeds the promise."""
    traced = trace_causal_lm_step(SHAPES["Llama-3.2-1B"](), 2048, checkpointing=True, fused_loss=True)
    assert traced.peak_bytes > 230 * MIB


def test_keys_and_values_are_most_of_what_grows_with_the_row():
    """From one row length to twice that, the peak grows by little more than stored keys and values (and the scores' inputs)."""
    config, tokens = SHAPES["Qwen2.5-0.5B"](), 1024
    config.num_hidden_layers = 6
    seeking = TokenSeekingConfig(token_seeking=True, token_scorer="random", always_keep="none")
    short, long = (trace_causal_lm_step(config, length, checkpointing=True, strategy=seeking).peak_bytes for length in (tokens, 2 * tokens))
    stored = 2 * config.num_hidden_layers * config.num_key_value_heads * 64 * 2 * tokens
    assert stored <= long - short <= 4 * stored


def test_stored_keys_and_values_are_gone_when_the_embedding_gets_its_gradient(monkeypatch):
    """With a head of its own that is not trained, that is the peak: one matrix of its size, and next to nothing beside it."""

    def all_but_the_head(model, lora_rank, checkpointing, trainable=MODULE._trainable):
        model = trainable(model, lora_rank, checkpointing)
        model.get_output_embeddings().weight.requires_grad_(False)
        return model

    monkeypatch.setattr(MODULE, "_trainable", all_but_the_head)
    config, tokens = SHAPES["Qwen2.5-0.5B"](), 8192
    config.num_hidden_layers, config.tie_word_embeddings = 4, False
    seeking = TokenSeekingConfig(token_seeking=True, token_ratio=0.1)
    traced = trace_causal_lm_step(config, tokens, lora_rank=None, checkpointing=True, strategy=seeking)
    embedding, stored = config.vocab_size * config.hidden_size * 2, 4 * 2 * config.num_key_value_heads * 64 * 2 * tokens
    assert stored == 16 * MIB and 0 <= traced.peak_bytes - embedding < 2 * MIB


# -- keys and values in host memory ------------------------------------------------------------------------------------

LAYERS, SHORT, LONG = 4, 1024, 1536  # Llama-3.2-1B has 16
STORED_IN_A_LAYER = 2 * 8 * 64 * 2  # bytes of a token: keys and values of 8 key heads of 64, in bfloat16


@cache
def streamed(tokens, kv_offload, order="chunks"):
    """Exact streaming of a few layers of Llama-3.2-1B in chunks of 512 tokens, LoRA, activation checkpointing."""
    config = SHAPES["Llama-3.2-1B"]()
    config.num_hidden_layers = LAYERS
    strategy = StreamingConfig(sequence_chunk_size=512, kv_offload=kv_offload, stream_order=order)
    return trace_causal_lm_step(config, tokens, checkpointing=True, strategy=strategy)


def growth(kv_offload) -> int:
    """Bytes of the device's peak from one row length to a longer one."""
    return streamed(LONG, kv_offload).peak_bytes - streamed(SHORT, kv_offload).peak_bytes


def test_offloading_leaves_a_quarter_of_what_grows_with_the_row():
    """The last hidden states, those with a label, and their gradient while the loss is taken; keys and values of two layers.

    However many layers there are: with all 16 that is a quarter of what grows without, keys and values and what is owed to them.
    """
    of_hidden_states = 2048 * 2 * (LONG - SHORT)
    assert growth(True) <= 3 * of_hidden_states + 2 * STORED_IN_A_LAYER * (LONG - SHORT)
    assert growth(True) <= 16 * 2 * STORED_IN_A_LAYER * (LONG - SHORT) / 4


def test_without_offloading_all_keys_and_values_grow_on_the_device():
    """The sibling: they, and what is owed to them, are what grows; so they would if offloading saved nothing."""
    assert growth(False) >= LAYERS * 2 * STORED_IN_A_LAYER * (LONG - SHORT)
    assert growth(False) > 2 * growth(True)
    assert streamed(SHORT, False).host_bytes == 0


def test_what_is_offloaded_is_in_host_memory():
    """Keys and values of all tokens; what is owed to all but the last chunk's."""
    for tokens in (SHORT, LONG):
        assert streamed(tokens, True).host_bytes == LAYERS * STORED_IN_A_LAYER * (2 * tokens - 512)
