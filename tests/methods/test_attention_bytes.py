"""What attention to earlier chunks needs in memory: keys, values and their sums, and no tensor of queries times keys."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core import pieces
from hf_memtune.memory import LiveBytes
from hf_memtune.memory.trace import _CountedHost
from hf_memtune.methods.attention import masks
from hf_memtune.methods.attention.passes import ChunkPass
from tests.support.stepping import model_and_batch, step_on

LAYERS, KEY_HEADS, HEADS, CHANNELS, CHUNK, BLOCK = 12, 2, 8, 16, 64, 64
A_TOKEN = 2 * LAYERS * KEY_HEADS * CHANNELS * 4  # bytes of its keys and values, float32
HIDDEN = 8 * 4  # and of a hidden state


def peak(tokens, **settings):
    """Peak of a step's live bytes beyond weights and gradients: on the device, and at home in host memory."""
    config = LlamaConfig(
        hidden_size=HIDDEN // 4,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=CHANNELS,
        vocab_size=64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).train()
    settings = {"stream_order": "chunks"} | settings
    model.gradient_checkpointing_enable()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK, **settings), check=False) as streaming, LiveBytes() as live:
        streaming.host = host = _CountedHost(live)
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak_bytes, host.live.peak_bytes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", BLOCK)


def test_a_row_costs_its_keys_values_and_sums(small_blocks):
    """Beyond weights and one chunk: at most 1.05 times them, and the hidden states of the row with their gradient."""
    (short, _), (long, _) = peak(CHUNK), peak(6 * BLOCK)
    assert long - short <= 1.05 * 2 * A_TOKEN * 6 * BLOCK + 3 * HIDDEN * 6 * BLOCK
    assert long - short > 0.9 * 2 * A_TOKEN * 5 * BLOCK  # the sibling: they are counted


def test_offloaded_they_cost_the_device_nothing(small_blocks):
    """What grows with the row on the device is what the caller has of it, less than a 32nd of its keys and values beside that."""
    (short, _), (long, at_home) = peak(3 * BLOCK, kv_offload=True), peak(6 * BLOCK, kv_offload=True)
    grown = (long - short) / (3 * BLOCK)
    assert grown <= 3 * HIDDEN + A_TOKEN / 32 + 16  # and ids, labels, positions
    assert at_home >= 1.8 * A_TOKEN * 6 * BLOCK
    assert (peak(6 * BLOCK)[0] - peak(3 * BLOCK)[0]) / (3 * BLOCK) > 1.8 * A_TOKEN


class _Largest(TorchDispatchMode):
    """The most keys that any tensor holds for each of a chunk's queries."""

    def __init__(self, queries):
        super().__init__()
        self.queries, self.keys = queries, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-2] == self.queries:
                if tensor.untyped_storage().nbytes() >= tensor.numel():  # and not a view of one number
                    self.keys = max(self.keys, tensor.shape[-1])
        return made


def most_keys(model, batch, chunk):
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk)) as streaming, _Largest(chunk) as seen:
        step_on(model, streaming, batch)
    return seen.keys


@pytest.mark.parametrize("name, side", [("llama", "right"), ("llama", "left"), ("qwen2-sliding", "right"), ("mistral-sliding", "left")])
def test_no_tensor_of_queries_times_keys_is_made(monkeypatch, name, side):
    monkeypatch.setattr(masks, "SQUARE", 13)
    monkeypatch.setattr(masks, "GROUP", 2)
    chunk, tokens = 13, 156  # numbers that are no size of the model
    model, batch, _ = model_and_batch(name, side, lengths=(tokens, tokens - 20))
    widest = max(parameter.shape[-1] for parameter in model.parameters())
    assert most_keys(model, batch, chunk) <= max(widest, chunk, model.config.vocab_size) < tokens - chunk
    with monkeypatch.context() as patch:
        patch.setattr(ChunkPass, "prefix_of", lambda *args, **kwargs: None)
        assert most_keys(model, batch, chunk) >= tokens  # the sibling: masks in full
