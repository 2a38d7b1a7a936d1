"""What attention to earlier chunks needs in memory: keys, values and their sums, and no tensor of queries times keys."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core import pieces
from hf_memtune.core.attention_kernels import PLAIN
from hf_memtune.memory import LiveBytes
from hf_memtune.methods.attention import masks
from hf_memtune.methods.attention.passes import ChunkPass
from tests.support.causal_lm_step import CountedHost
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
        streaming.host = host = CountedHost(live)
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak_bytes, host.live.peak_bytes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", BLOCK)


def test_a_row_costs_its_keys_values_and_sums(small_blocks):
    """Beyond weights and one chunk: at most 1.05 times them, and the hidden states of the row with their gradient. The last chunk's has no sums."""
    (short, _), (long, _) = peak(CHUNK), peak(6 * BLOCK)
    stored = A_TOKEN * (6 + 5) * BLOCK
    assert 0.9 * stored < long - short <= 1.05 * stored + 3 * HIDDEN * 6 * BLOCK


def test_offloaded_they_cost_the_device_nothing(small_blocks):
    """What grows with the row on the device is what the caller has of it, less than a 32nd of its keys and values beside that."""
    (short, _), (long, at_home) = peak(3 * BLOCK, kv_offload=True), peak(6 * BLOCK, kv_offload=True)
    grown = (long - short) / (3 * BLOCK)
    assert grown <= 3 * HIDDEN + A_TOKEN / 32 + 16  # and ids, labels, positions
    assert at_home >= 1.8 * A_TOKEN * 6 * BLOCK
    assert (peak(6 * BLOCK)[0] - peak(3 * BLOCK)[0]) / (3 * BLOCK) > 1.8 * A_TOKEN


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor has, in whatever shape."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= tensor.nbytes:  # and not a view of one number
                self.numbers = max(self.numbers, tensor.numel())
        return made


def most_numbers(model, batch, chunk, order):
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk, stream_order=order)) as streaming, _Largest() as seen:
        step_on(model, streaming, batch)
    return seen.numbers


@pytest.mark.parametrize(
    "name, side, order",
    [
        ("llama", "right", "chunks"),
        ("llama", "left", "layers"),
        ("qwen2-sliding", "right", "layers"),
        ("mistral-sliding", "left", "chunks"),
    ],
)
def test_no_tensor_of_queries_times_keys_is_made(monkeypatch, name, side, order):
    """A chunk is longer than anything else of a token is wide, so that what has fewer numbers is all that a step needs beside."""
    monkeypatch.setattr(masks, "SQUARE", 64)
    monkeypatch.setattr(masks, "GROUP", 2)
    chunk, tokens = 160, 960
    model, batch, _ = model_and_batch(name, side, lengths=(tokens, tokens - 20), num_hidden_layers=2)
    assert most_numbers(model, batch, chunk, order) < chunk * tokens
    with monkeypatch.context() as patch:
        patch.setattr(ChunkPass, "prefix_of", lambda *args, **kwargs: None)
        assert most_numbers(model, batch, chunk, order) >= chunk * tokens  # the sibling: masks in full
    monkeypatch.setattr(pieces, "kernel_for", lambda *args: PLAIN)
    assert most_numbers(model, batch, chunk, order) >= chunk * tokens  # and scores, by head
