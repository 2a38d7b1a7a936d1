"""The context pass of a stream takes several small chunks at once, where that changes neither numbers nor the peak of bytes."""

import pytest
import torch

from hf_memtune import MemTuneError, Streaming, StreamingConfig
from hf_memtune.memory.shapes import SHAPES
from hf_memtune.methods.attention import context
from hf_memtune.methods.attention.passes import ContextPass
from hf_memtune.methods.events import Listener
from hf_memtune.methods.streaming import chunk_stream
from hf_memtune.units import MIB
from tests.support.causal_lm_step import trace_causal_lm_step
from tests.support.stepping import model_and_batch, plain_twin, step_on, stream
from tests.support.tolerances import tolerance
from tests.support.twin import worst_difference

LENGTHS, CHUNK = (31, 22), 3  # 11 chunks, of which the context pass runs 10


def deep(name="llama", layers=8, **overrides):
    return model_and_batch(name, lengths=LENGTHS, num_hidden_layers=layers, **overrides)


def streamed(model, batch, order=None):
    """A step, and the tokens of each part of its context pass."""
    widths = []

    def noted(spans, *args):
        if model.training:  # and not in the probe before
            widths.append(spans["decoder"].index.shape[1])
        return ContextPass(spans, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "ContextPass", noted)
        return stream(model, batch, CHUNK, order), widths


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers, expected", [(3, [3] * 10), (8, [3, 6, 6, 6, 6, 3]), (12, [3, 9, 9, 9])])
def test_the_gradient_is_exact_however_many_run_at_once(layers, expected, side):
    model, batch, dtype = deep(layers=layers, side=side)
    taken, found = streamed(model, batch)
    assert found == expected
    assert worst_difference(taken.gradients, plain_twin(model, batch)[1]) <= tolerance(dtype)


@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma3"])
def test_windows_that_reach_across(name):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 4} if name == "gemma3" else {"layer_types": ["sliding_attention"] * 8}
    model, batch, dtype = deep(name, **kinds)
    taken, found = streamed(model, batch)
    assert max(found) == 2 * CHUNK
    assert worst_difference(taken.gradients, plain_twin(model, batch)[1]) <= tolerance(dtype, float32_inside=name == "gemma3")


def test_keys_and_values_that_are_missing_would_be_noticed(monkeypatch):
    """The sibling: a pass that leaves out its last chunk leaves a gap, which the store refuses."""
    model, batch, _ = deep()
    monkeypatch.setattr(chunk_stream.ChunkStream, "_chunks_together", lambda self: 2)
    original = chunk_stream.context_pass

    def short(router, call, store, records, chunks, until, *rest):
        return original(router, call, store, records, chunks, until - 1, *rest)

    monkeypatch.setattr(chunk_stream, "context_pass", short)
    with pytest.raises(MemTuneError, match="has keys and values of"):
        stream(model, batch, CHUNK)


@pytest.mark.parametrize("change", ["dropout", "checkpointing"])
def test_one_at_a_time_where_it_matters(change):
    """Random numbers would be drawn in another order; with checkpointing a chunk with gradient needs less than two without."""
    model, batch, _ = deep(attention_dropout=0.3 if change == "dropout" else 0.0)
    if change == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert streamed(model, batch, "chunks")[1] == [3] * 10


@pytest.mark.parametrize("token, expected", [(-1, [3, 6, 6, 6, 6, 3]), (7, [3, 6, 6, 6, 3, 3, 3, 3, 3])])
def test_random_numbers_that_begin_late(token, expected):
    """Drawn only where a token is, in a chunk that runs with another: that part runs again, a chunk at a time."""
    model, batch, _ = deep()
    batch["input_ids"][batch["input_ids"] == 7] = 8
    batch["input_ids"][:, 20] = 7
    drawn = {}

    def drop(module, args, output):
        if not (args[0] == token).any():
            return output
        kept = torch.rand(output.shape[:2]) > 0.5
        drawn.setdefault(tuple(args[0].flatten().tolist()), []).append(kept)
        return output * kept[..., None]

    hook = model.get_input_embeddings().register_forward_hook(drop)
    _, widths = streamed(model, batch)
    hook.remove()
    assert widths == expected
    again = [kept for kept in drawn.values() if len(kept) > 1]  # without gradient, and with it
    assert len(again) == (token == 7) and all(torch.equal(*kept) for kept in again)


class Watch(Listener):
    """Whether a context pass left keys and values on the device, and of how many layers in host memory."""

    stored, homes = False, 0

    def context_begins(self, stored):
        self._stored = stored

    def context_ends(self):
        self.stored = bool(self._stored())
        self.homes = len(getattr(self._stored.__self__.store, "_homes", {}))


@pytest.mark.parametrize("kv_offload", [False, True])
@pytest.mark.parametrize("chunk, stores", [(16, True), (31, False), (64, False)])
def test_a_row_of_one_chunk_stores_nothing(chunk, stores, kv_offload):
    """No other chunk asks for its keys and values: the row goes the model's own way, which is plain training."""
    model, batch, dtype = deep(layers=3)
    watch = Watch()
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk, kv_offload=kv_offload)) as streaming:
        streaming.listeners.add(watch)
        taken = step_on(model, streaming, batch)
    assert worst_difference(taken.gradients, plain_twin(model, batch)[1]) <= tolerance(dtype)
    assert watch.stored is (stores and not kv_offload) and watch.homes == (3 if stores and kv_offload else 0)


def test_a_row_of_one_chunk_needs_what_a_fused_loss_needs():
    """Under activation checkpointing, where plain training keeps no keys and values."""
    config = SHAPES["Qwen2.5-0.5B"]()
    config.num_hidden_layers = 4
    streaming = StreamingConfig(sequence_chunk_size=2048)
    ours = trace_causal_lm_step(config, 2048, checkpointing=True, strategy=streaming).peak_bytes
    plain = trace_causal_lm_step(config, 2048, checkpointing=True, fused_loss=True).peak_bytes
    stored = 4 * 2 * config.num_key_value_heads * 64 * 2 * 2048
    assert stored == 4 * MIB and ours - plain < MIB / 4


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_of_one_chunk_holds_the_gradient_of_a_shared_matrix_once(tied):
    """Autograd has that of the head, that of the embedding, and their sum."""
    config = SHAPES["Qwen2.5-0.5B"]()
    config.num_hidden_layers, config.tie_word_embeddings = 4, tied
    given = {"checkpointing": True, "lora_rank": None}
    ours = trace_causal_lm_step(config, 64, strategy=StreamingConfig(sequence_chunk_size=2048), **given).peak_bytes
    plain = trace_causal_lm_step(config, 64, fused_loss=True, **given).peak_bytes
    matrix = config.vocab_size * config.hidden_size * 2
    assert (plain - ours > 0.9 * matrix) is tied and ours - plain < MIB / 4


def train_the_last_layer(model):
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)


def train_the_layers(model):
    model.model.embed_tokens.requires_grad_(False)


def train_the_head(model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)


@pytest.mark.parametrize("change, widest", [(train_the_last_layer, 3), (train_the_layers, 6), (train_the_head, 0)])
def test_layers_without_gradient_keep_nothing_and_do_not_count(change, widest):
    """A body of which nothing is trained goes its own way, without a context pass."""
    model, batch, _ = deep()
    change(model)
    assert max(streamed(model, batch)[1], default=0) == widest


def test_the_peak_is_what_it_was(monkeypatch):
    """Of five chunks the context pass runs four, two at a time."""
    config = SHAPES["Llama-3.2-1B"]()
    config.num_hidden_layers = 8

    widths = []

    def noted(spans, *args):
        widths.append(spans["decoder"].index.shape[1])
        return ContextPass(spans, *args)

    monkeypatch.setattr(context, "ContextPass", noted)

    def peak():
        widths.clear()
        return trace_causal_lm_step(config, 160, strategy=StreamingConfig(sequence_chunk_size=32)).peak_bytes, max(widths)

    together = peak()
    monkeypatch.setattr(chunk_stream, "CONTEXT_TOKENS", 1)
    one_by_one = peak()
    assert together[0] == one_by_one[0] and (together[1], one_by_one[1]) == (64, 32)
