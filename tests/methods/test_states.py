"""Layers that hand states on: linear attention, state-space scans, short convolutions, alone or beside attention."""

import copy
import gc

import pytest
import torch
from torch import nn

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, checkpoint_in_two_levels, make_reversible
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.states import States
from tests.support.any_type import TOKENS, batch_of, tiny
from tests.support.composition import whole_error, with_lora
from tests.support.removal import registered, traces
from tests.support.reversible_exactness import assert_equal_steps, both_steps
from tests.support.reversible_models import settings
from tests.support.tolerances import NOTICED
from tests.support.twin import gradients

# one for each way of handing on: gated delta rule; Mamba-2 beside attention; both in one layer; a convolution alone; layers of experts
# between them, without any; a list of states in the cache itself; several states of a layer; Mamba-2 alone, whose cache has another name
HYBRIDS = ["qwen3_5_text", "granitemoehybrid", "falcon_h1", "lfm2", "nemotron_h", "minimax", "kimi_linear", "mamba2"]
ALLOWED = 2e-5  # of the whole gradient: scans compute in float32, and sum in another order for other chunks
CHUNKS = (5, 7, 23)  # 24 = 23 + 1: a single token is no chunk


def plain(model, batch):
    return gradients(model, model(**batch).loss)


def streamed(model, batch, chunk, check=True, **settings):
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk, **settings), check=check):
        return gradients(model, model(**batch).loss)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_gradients_equal_plain_backpropagation(name, padding):
    model = tiny(name)
    batch = batch_of(model, "causal", padding)
    expected = plain(model, batch)
    for number, chunk in enumerate(CHUNKS if padding is None else CHUNKS[:1]):
        assert whole_error(streamed(model, batch, chunk, check=number == 0), expected) <= ALLOWED


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_without_their_gradient_are_noticed(monkeypatch, name):
    """Truncated backpropagation."""
    model = tiny(name)
    batch = batch_of(model, "causal")
    expected = plain(model, batch)
    monkeypatch.setattr(States, "roots", lambda self, cache: ([], []))
    assert whole_error(streamed(model, batch, 7, check=False), expected) > NOTICED
    with pytest.raises(UnsupportedModelError, match="another gradient in chunks"):
        Streaming(model, StreamingConfig(sequence_chunk_size=7))


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_that_are_not_handed_on_are_noticed(monkeypatch, name):
    model = tiny(name)
    begin = States.begin

    def empty(self, number, start, running):
        cache = begin(self, 0, start, running)
        return cache

    monkeypatch.setattr(States, "begin", empty)
    with pytest.raises(UnsupportedModelError, match="another gradient in chunks"):
        Streaming(model, StreamingConfig(sequence_chunk_size=7))


@pytest.mark.parametrize("name", HYBRIDS)
def test_outputs_are_the_models_own_and_nothing_stays_behind(name):
    model = tiny(name)
    batch, before, there = batch_of(model, "causal", "right"), traces(model), registered()
    expected = model(**batch)
    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=7))
    found = model(**batch)
    streaming.remove()
    assert torch.allclose(found.loss, expected.loss, rtol=1e-5) and torch.allclose(found.logits, expected.logits, atol=1e-4)
    del found, expected
    gc.collect()  # a call that has yet to go backward keeps what it needs for that
    assert traces(model) == before and registered() <= there


@pytest.mark.parametrize("name, reentrant", [*((name, False) for name in HYBRIDS), *((name, True) for name in HYBRIDS[:4])])
def test_checkpointing_inside_chunks(name, reentrant, caplog):
    """A layer that runs again begins with the states that it began with, and leaves none a second time."""
    model = tiny(name)
    batch = batch_of(model, "causal", "right")
    expected = plain(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert whole_error(streamed(model, batch, 7), expected) <= ALLOWED
    assert "incompatible" not in caplog.text


@pytest.mark.parametrize("name", HYBRIDS)
def test_lora_under_autocast(name):
    model = tiny(name, dtype=torch.float32)
    linear = {n.rpartition(".")[2] for n, module in model.named_modules() if type(module) is nn.Linear}
    model = with_lora(model, sorted(linear - {"lm_head", "out_proj"}))  # PEFT refuses out_proj beside a Mamba scan
    batch = batch_of(model, "causal", "right")
    exact = plain(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        under, found = plain(model, batch), streamed(model, batch, 7)
    assert whole_error(found, exact) <= 1.5 * whole_error(under, exact)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])  # Granite's masks are made without positions
def test_packed_rows_learn_as_plainly(name):
    """Attention keeps to its own sequence; what recurrent layers do with positions that restart is the model's own."""
    model = tiny(name)
    batch = batch_of(model, "causal") | {"position_ids": torch.cat([torch.arange(9), torch.arange(TOKENS - 9)])[None].expand(2, -1)}
    batch["use_cache"] = False  # where a model makes a cache, transformers does not look for packed rows
    expected = plain(model, batch)
    assert whole_error(streamed(model, batch, 7), expected) <= ALLOWED
    assert whole_error(streamed(model, batch | {"position_ids": torch.arange(TOKENS)[None].expand(2, -1)}, 7), expected) > NOTICED


def test_rows_that_are_packed_by_their_lengths_are_refused():
    """Kernels of such layers begin anew where the lengths of whole rows say so."""
    model = tiny("qwen3_5_text")
    batch = batch_of(model, "causal") | {"cu_seq_lens_q": torch.tensor([0, 9, TOKENS, 2 * TOKENS])}
    batch["position_ids"] = torch.arange(TOKENS)[None].expand(2, -1)
    with pytest.raises(MemTuneError, match="cu_seq_lens_q: .*without packing"):
        streamed(model, batch, 7)


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "falcon_h1"])
def test_dropout_is_replayed(name):
    """What a chunk draws forward, it draws again: the gradient is that of the loss that was returned."""
    model = tiny(name)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.model.layers[1].register_forward_hook(lambda module, args, output: _dropped(output))
    batch = batch_of(model, "causal")
    model.zero_grad()
    with Streaming(model, StreamingConfig(sequence_chunk_size=7), check=False):
        torch.manual_seed(3)
        found = gradients(model, model(**batch).loss)
        direction = {n: g / sum(x.norm() ** 2 for x in found.values()) ** 0.5 for n, g in found.items()}
        slope = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for n, p in moved.named_parameters():
                    if n in direction:
                        p.add_(direction[n], alpha=sign * 1e-4)
            with Streaming(moved, StreamingConfig(sequence_chunk_size=7), check=False):
                torch.manual_seed(3)
                slope.append(moved(**batch).loss.item())
    expected = sum((found[n] * direction[n]).sum() for n in found).item()
    assert (slope[0] - slope[1]) / 2e-4 == pytest.approx(expected, rel=2e-2)


def _dropped(output):
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    hidden = nn.functional.dropout(hidden, 0.3)
    return (hidden, *rest) if isinstance(output, tuple) else hidden


# -- token seeking


@pytest.mark.parametrize("name", HYBRIDS)
def test_sampled_losses_have_the_gradient_of_what_they_return(name):
    model = tiny(name)
    batch = batch_of(model, "causal")
    expected = plain(model, batch)
    every = TokenSeekingConfig(
        token_seeking=True, token_ratio=1 - 1e-9, token_selection="top", token_gradient="stream", sequence_chunk_size=7
    )
    with TokenSeeking(model, every):
        assert whole_error(gradients(model, model(**batch).loss), expected) <= ALLOWED
    half = TokenSeekingConfig.of(every, token_ratio=0.5)
    with TokenSeeking(model, half):
        assert whole_error(gradients(model, model(**batch).loss), expected) > NOTICED


@pytest.mark.parametrize("name, gradient", [*((name, "cut") for name in HYBRIDS), *((name, "skip") for name in HYBRIDS[:2])])
def test_leaving_tokens_out_is_refused_with_a_remedy_that_works(name, gradient):
    model = tiny(name)
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match="token_gradient=stream and sequence_chunk_size=512"):
        TokenSeeking(
            model, TokenSeekingConfig(token_seeking=True, token_gradient=gradient, sequence_chunk_size=None if gradient == "cut" else 7)
        )
    assert traces(model) == before
    TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_gradient="stream", sequence_chunk_size=512)).remove()


def test_scores_of_attention_need_a_layer_that_attends():
    model = tiny("granitemoehybrid")  # its layer 1 attends
    seeking = {"token_seeking": True, "token_gradient": "stream", "sequence_chunk_size": 7, "token_scorer": "context"}
    with pytest.raises(ConfigError, match=r"context_layer: got -1, which does not attend .* Expected one of 1\."):
        TokenSeeking(model, TokenSeekingConfig(**seeking))
    with TokenSeeking(model, TokenSeekingConfig(**seeking, context_layer=1, token_ratio=0.5)):
        assert gradients(model, model(**batch_of(model, "causal")).loss)
    with pytest.raises(UnsupportedModelError, match="the last block needs what a cache hands on"):
        TokenSeeking(model, TokenSeekingConfig(**seeking | {"token_scorer": "gradient"}))


# -- what cannot be


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_scans_that_take_no_state_are_refused_for_that_reason(name):
    with pytest.raises(UnsupportedModelError, match="the scan of Mamba-1 takes no state"):
        Streaming(tiny(name), StreamingConfig(sequence_chunk_size=7))


def test_two_levels_inside_of_chunks_are_refused():
    model = tiny("granitemoehybrid")
    handle = checkpoint_in_two_levels(model)
    with (
        pytest.raises(UnsupportedModelError, match="checkpoint_levels=1"),
        Streaming(model, StreamingConfig(sequence_chunk_size=7), check=False),
    ):
        model(**batch_of(model, "causal"))
    handle.restore()


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_as_they_are_can_be_reversible(name):
    """Bit by bit what autograd finds of the same coupled network. Adapters need layers whose halves are known."""
    model = tiny(name)
    batch = batch_of(model, "causal", "right")
    handle = make_reversible(model, settings("centred", "exact", adapter_rank=0))
    assert_equal_steps(*both_steps(model, batch, handle))
    handle.restore()
    if name not in ("kimi_linear",):  # laid out as Llama's are
        with pytest.raises(UnsupportedModelError, match="reversible=centred with adapter_rank=0"):
            make_reversible(model, settings("meft1", "exact"))


def test_a_second_backward_says_what_is_wrong():
    model = tiny("lfm2")
    with Streaming(model, StreamingConfig(sequence_chunk_size=7)):
        loss = model(**batch_of(model, "causal")).loss
        loss.backward(retain_graph=True)
        with pytest.raises(MemTuneError, match="a second time"):
            loss.backward()


# -- memory


def boundaries(name, chunk, **settings):
    """Bytes of states that a stream keeps when all chunks have gone forward, and those of one boundary."""
    model, kept = tiny(name, dtype=torch.float32), []
    batch = batch_of(model, "causal")
    end = States.end

    def watched(self, number, cache):
        end(self, number, cache)
        kept.append(sum(state.nbytes for state in self.tensors()))

    with pytest.MonkeyPatch.context() as patch:
        streaming = Streaming(model, StreamingConfig(sequence_chunk_size=chunk, **settings), check=False)
        patch.setattr(States, "end", watched)
        model(**batch).loss.backward()
        streaming.remove()
    return kept


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_boundary_holds_the_states_and_no_more(name):
    """As many bytes a boundary, however long the chunks are: a view of a chunk's inputs would hold all of them."""
    short, long = boundaries(name, 4), boundaries(name, 8)
    assert short == [short[0] * number for number in range(1, 6)] and long == [short[0], 2 * short[0]]
    assert short[0] > 0


@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid", "lfm2"])
def test_states_are_offloaded_with_keys_and_values(name):
    assert boundaries(name, 4, kv_offload=True) == [0] * 5
    model = tiny(name)
    batch = batch_of(model, "causal", "left")
    assert whole_error(streamed(model, batch, 7, kv_offload=True), plain(model, batch)) <= ALLOWED
