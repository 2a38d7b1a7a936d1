"""Exact streaming that keeps what attention gave in forward: the gradients are those of plain training, and no attention runs twice."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_memtune import Streaming, StreamingConfig, TokenSeekingConfig
from hf_memtune.core import pieces
from hf_memtune.core.attention_kernels import Attended
from hf_memtune.core.kept_attention import KeptAttention
from hf_memtune.core.offload import HostMemory
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.memory import LiveBytes
from hf_memtune.methods.attention import passes
from tests.support.causal_lm_step import CountedHost
from tests.support.composition import REENTRANT, checkpointed, with_lora
from tests.support.packing import packed_batch
from tests.support.removal import registered, traces
from tests.support.stepping import loss_of, model_and_batch, plain_twin, seek_in_stream, step_on, stream
from tests.support.streaming import LENGTHS, allowed, assert_streams
from tests.support.tiny_models import CAUSAL, tiny_model
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import worst_difference

ORDERS = pytest.mark.parametrize("order", ["chunks", "layers"])


def in_pieces(model) -> bool:
    with Streaming(model, StreamingConfig(sequence_chunk_size=5)) as streaming:
        return streaming.router.kernel_facts.in_pieces


NAMES = [*CAUSAL, "deepseek-v3", "bart"]


# -- exactness -------------------------------------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("side, chunk", [("right", 1), ("left", 4), ("right", 5)])
@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_plain_backpropagation(name, side, chunk, order):
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    if not in_pieces(model):
        with pytest.raises(
            UnsupportedModelError, match="keep_attention_outputs: got True, expected False: its attention is computed by its own kernel"
        ):
            stream(model, batch, chunk, order, keeps=True)
        return
    assert_streams(model, batch, chunk, allowed(name, dtype), order=order, keeps=True)


def test_most_models_are_not_refused():
    """The sibling of the refusals above."""
    kept = [name for name in NAMES if in_pieces(model_and_batch(name)[0])]
    assert {"llama", "qwen2-sliding", "gpt2"} < set(kept) and len(kept) > len(NAMES) / 2


@ORDERS
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_packed_rows(name, order):
    model = tiny_model(name)
    assert_streams(model, packed_batch(), 4, tolerance(torch.float64), order=order, keeps=True)


@ORDERS
@REENTRANT
def test_checkpointed_layers_and_lora(reentrant, order):
    """By chunks, a checkpointed layer asks for the same attention twice."""
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    model = with_lora(model)
    expected = plain_twin(model, batch)
    assert_streams(checkpointed(model, reentrant), batch, 5, tolerance(dtype), expected, order=order, keeps=True)


@ORDERS
def test_several_calls_before_one_backward(order):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    other = batch | {"input_ids": batch["input_ids"].flip(0)}
    expected = torch.autograd.grad(loss_of(model, batch)[0] + 2 * loss_of(model, other)[0], list(model.parameters()))
    alone = torch.autograd.grad(3 * loss_of(model, batch)[0], list(model.parameters()))
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order, keep_attention_outputs=True)):
        found = torch.autograd.grad(loss_of(model, batch)[0] + 2 * loss_of(model, other)[0], list(model.parameters()))
    found, expected, other = ({str(n): g for n, g in enumerate(each)} for each in (found, expected, alone))
    assert worst_difference(found, expected) <= tolerance(dtype)
    assert worst_difference(other, expected) > NOTICED


def test_chosen_tokens_in_a_stream():
    """The choice is the same: attention runs fewer times, and the gradient is what it is without."""
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    found, runs = {}, {}
    for keeps in (True, False):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            attended = pieces.attend_with_gradient
            patch.setattr(passes, "attend_with_gradient", lambda *args: calls.append(args[-1] is not None) or attended(*args))
            found[keeps] = seek_in_stream(model, batch, 5, keep_attention_outputs=keeps)
        runs[keeps] = calls
    assert all(torch.equal(a, b) for a, b in zip(found[True].kept.values(), found[False].kept.values()))
    assert worst_difference(found[True].gradients, found[False].gradients) <= tolerance(dtype)
    assert any(runs[True]) and not any(runs[False])


@pytest.mark.parametrize("host", [None, HostMemory()], ids=["device", "host"])
def test_who_asks_may_change_what_it_is_given(host):
    """A layer may work in place on its attention, and a checkpointed one asks again. Of tokens that were not kept there is nothing."""
    kept, found = KeptAttention(host), Attended(torch.randn(1, 4, 6, 3), torch.randn(1, 4, 6))
    for start in (0, 3):
        kept.put(7, Attended(*(part[:, :, start : start + 3] for part in found)), start, 9)
    for _ in range(2):
        given = kept.get(7, 2, 4)
        assert all(torch.equal(mine, whole[:, :, 2:6]) for mine, whole in zip(given, found))
        for part in given:
            part.mul_(2)
    assert kept.get(7, 4, 3) is None and kept.get(8, 0, 1) is None
    kept.drop(7)
    assert kept.is_empty and kept.get(7, 0, 1) is None


@ORDERS
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2"])
def test_from_host_memory_bit_for_bit(name, order):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, dtype=torch.float32)
    found = []
    for offload in (True, False):
        settings = StreamingConfig(sequence_chunk_size=5, stream_order=order, kv_offload=offload, keep_attention_outputs=True)
        with Streaming(model, settings) as streaming:
            found.append(step_on(model, streaming, batch).gradients)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


@pytest.mark.parametrize("part", ["output", "lse"])
@ORDERS
def test_what_is_kept_is_what_goes_backward(monkeypatch, order, part):
    """The sibling of the equalities: attention that changes on its way is noticed."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    get = KeptAttention.get

    def changed(self, *where):
        found = get(self, *where)
        return found and Attended(**(found._asdict() | {part: getattr(found, part) * 1.1}))

    monkeypatch.setattr(KeptAttention, "get", changed)
    assert worst_difference(stream(model, batch, 5, order, keeps=True).gradients, expected) > NOTICED


# -- what it saves, and what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("order, checkpointing, times", [("chunks", False, 2), ("layers", True, 2), ("chunks", True, 3)])
def test_no_attention_runs_twice(monkeypatch, order, checkpointing, times):
    """times: that it runs where it is not kept. By chunks the last chunk of a row runs with gradient at once, once less."""
    model, batch, _ = model_and_batch("llama", lengths=(12,), num_hidden_layers=2)
    model = checkpointed(model, False) if checkpointing else model
    queries, attend = [], pieces.attend

    def counting(query, prefix):
        queries.append(query.shape[2])
        return attend(query, prefix)

    counts = {}
    for keeps in (False, True):
        settings = StreamingConfig(sequence_chunk_size=4, stream_order=order, keep_attention_outputs=keeps)
        with Streaming(model, settings) as streaming, monkeypatch.context() as patch:
            queries.clear()
            for module in (pieces, passes):
                patch.setattr(module, "attend", counting)
            step_on(model, streaming, batch)
        counts[keeps] = sum(queries)
    last = 4 * 2 if order == "chunks" else 0  # queries of the last chunk, in all layers
    assert counts[False] == times * 12 * 2 - last
    assert counts[True] == 12 * 2 + (last if checkpointing else 0)  # a checkpointed last chunk has nothing kept


LAYERS, HEADS, CHANNELS, CHUNK = 6, 4, 8, 32
A_TOKEN = LAYERS * HEADS * (CHANNELS + 1) * 4  # bytes of the outputs and lse of a token, float32


def peaks(tokens, order, keeps, offload=False):
    """Peak of a step's live bytes beyond weights and gradients: on the device, and at home in host memory."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=1,
        head_dim=CHANNELS, vocab_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    settings = StreamingConfig(sequence_chunk_size=CHUNK, kv_offload=offload, stream_order=order, keep_attention_outputs=keeps)
    with Streaming(model, settings, check=False) as streaming, LiveBytes() as live:
        streaming.host = host = CountedHost(live)
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak_bytes, host.live.peak_bytes


@ORDERS
def test_a_token_costs_its_outputs_in_all_layers(monkeypatch, order):
    monkeypatch.setattr(pieces, "BLOCK", CHUNK)  # in rows shorter than a block other things grow too
    short, long = ({keeps: peaks(n * CHUNK, order, keeps)[0] for keeps in (False, True)} for n in (8, 16))
    grown = {keeps: (long[keeps] - short[keeps]) / (8 * CHUNK) for keeps in (False, True)}
    assert 0.9 * A_TOKEN < grown[True] - grown[False] <= A_TOKEN


@ORDERS
def test_offloaded_it_costs_the_device_nothing_that_grows(monkeypatch, order):
    monkeypatch.setattr(pieces, "BLOCK", CHUNK)
    found = {(n, keeps): peaks(n * CHUNK, order, keeps, offload=True) for n in (8, 16) for keeps in (False, True)}
    grown = {keeps: found[16, keeps][0] - found[8, keeps][0] for keeps in (False, True)}
    assert grown[True] <= grown[False] + 64
    more = [found[n, True][1] - found[n, False][1] for n in (8, 16)]
    assert 0.9 * A_TOKEN * 8 * CHUNK < more[1] - more[0] <= A_TOKEN * 8 * CHUNK


# -- where it cannot be ----------------------------------------------------------------------------------------------


def test_settings():
    assert StreamingConfig(keep_attention_outputs=True).ineffective() == {"keep_attention_outputs": "without sequence_chunk_size"}
    for gradient in ("cut", "skip", "stream"):  # skip runs some tokens of a chunk, of which others were kept
        chunk = None if gradient == "cut" else 4
        config = TokenSeekingConfig(token_seeking=True, token_gradient=gradient, keep_attention_outputs=True, sequence_chunk_size=chunk)
        idle = {} if gradient == "stream" else {"keep_attention_outputs": f"with token_gradient={gradient}"}
        assert config.ineffective() == idle and config.keeps_attention is (gradient == "stream")


def test_eager_attention_is_refused_and_nothing_is_changed():
    model, _, _ = model_and_batch("llama")
    model.set_attn_implementation("eager")
    before, ours = traces(model), registered()
    with pytest.raises(UnsupportedModelError, match=r"keep_attention_outputs: got True.*\(eager\).*attn_implementation='sdpa'"):
        Streaming(model, StreamingConfig(sequence_chunk_size=5, keep_attention_outputs=True))
    assert traces(model) == before and registered() <= ours
    model.set_attn_implementation("sdpa")  # the remedy
    Streaming(model, StreamingConfig(sequence_chunk_size=5, keep_attention_outputs=True)).remove()


@ORDERS
def test_dropout_of_attention_is_refused_by_the_first_call(order):
    model, batch, _ = model_and_batch("llama", attention_dropout=0.3)
    with pytest.raises(MemTuneError, match="keep_attention_outputs: got True, but no attention of this call could be kept.*dropout"):
        stream(model, batch, 5, order, keeps=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    stream(model, batch, 5, order)  # the remedy


@ORDERS
def test_layers_whose_attention_cannot_be_kept_are_named_once(caplog, order):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    expected = plain_twin(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order, keep_attention_outputs=True)) as streaming:
        assert worst_difference(step_on(model, streaming, batch).gradients, expected[1]) <= tolerance(dtype) and not caplog.messages
        model.model.layers[1].self_attn.attention_dropout = 0.3
        for _ in range(2):
            step_on(model, streaming, batch)
    (message,) = caplog.messages
    assert (
        "the attention of layers.1.self_attn is computed again in backward: its own kernel computes it, as it does with dropout" in message
    )


def test_a_module_that_attends_twice_is_refused():
    model, batch, _ = model_and_batch("llama")
    layer = model.model.layers[1]
    attend = layer.self_attn.forward

    def twice(*args, **kwargs):
        attend(*args, **(kwargs | {"hidden_states": kwargs["hidden_states"] * 2}))
        return attend(*args, **kwargs)

    layer.self_attn.forward = twice
    with pytest.raises(MemTuneError, match="LlamaAttention attends twice in one pass"):
        stream(model, batch, 5, "chunks", keeps=True)


@ORDERS
def test_rows_of_one_chunk_run_as_they_do_without(order):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    assert_streams(model, batch, 20, tolerance(dtype), order=order, keeps=True)
