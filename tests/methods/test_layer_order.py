"""A stream by layers: each layer's chunks go backward before the layer below has its turn. The gradients are those of plain training."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_memtune import Streaming, StreamingConfig, TokenSeekingConfig
from hf_memtune.architectures import describe
from hf_memtune.core import pieces
from hf_memtune.core.offload import HostTensor
from hf_memtune.core.rng import RandomTape
from hf_memtune.core.rows import RowTensor
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.memory import LiveBytes
from hf_memtune.methods.attention import masks, model_pass
from hf_memtune.methods.attention.masks import Asked
from hf_memtune.methods.attention.passes import KeysPass
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from hf_memtune.methods.streaming.layer_facts import all_checkpointing
from hf_memtune.methods.streaming.layer_stream import LayerStream
from tests.support.any_type import batch_of, tiny
from tests.support.causal_lm_step import CountedHost
from tests.support.composition import REENTRANT, checkpointed, with_lora
from tests.support.packing import packed_batch
from tests.support.removal import registered, traces
from tests.support.slopes import DROPOUT, SLOPE_TOLERANCE, STEP, slope_error
from tests.support.stepping import loss_of, model_and_batch, plain_twin, step_on, stream
from tests.support.streaming import LENGTHS, allowed, assert_embeddings_learn, assert_streams, cut_small
from tests.support.tiny_models import CAUSAL, tiny_model
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, worst_difference

NAMES = [*CAUSAL, "llama4", "gpt-oss", "cohere2", "deepseek-v3", "afmoe", "bart", "pegasus", "m2m100"]


def assert_equal(model, batch, chunk, limit, expected=None, **settings):
    found = assert_streams(model, batch, chunk, limit, expected, order="layers", **settings)
    assert found.heard.turns >= len(found.heard.chunks)
    return found


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, chunk, is_cut", [("right", 1, False), ("left", 4, True), ("right", 5, False), ("right", 12, False)])
@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_plain_backpropagation(monkeypatch, name, side, chunk, is_cut):
    if is_cut:
        cut_small(monkeypatch)
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    if name == "gemma2":  # eager attention lets a token that sees nothing see everything
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"].cumsum(1) == 1, -100)
    found = assert_equal(model, batch, chunk, allowed(name, dtype))
    tokens = found.outputs.logits.shape[1]
    assert found.heard.chunks == [-(-tokens // chunk)] and tokens in (11, 12)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_padding_or_mask(name):
    model, batch, dtype = model_and_batch(name, lengths=(12, 12))
    batch.pop("attention_mask", None)
    assert_equal(model, batch, 5, allowed(name, dtype))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt-oss"])
def test_eager_attention(name):
    model, batch, _ = model_and_batch(name, _attn_implementation="eager", sliding_window=8, lengths=LENGTHS)
    assert_equal(model, batch, 5, tolerance(torch.float64, float32_inside=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gemma3", "gpt2"])
def test_packed_rows(name):
    assert_equal(tiny_model(name), packed_batch(), 4, allowed(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_embeddings_in_place_of_ids_and_their_gradient(name):
    assert_embeddings_learn(name, 5, order="layers")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_several_calls_before_one_backward(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    other = {key: value.flip(0) for key, value in batch.items()}

    def loss():
        first, second = loss_of(model, batch)[0], loss_of(model, other)[0]
        return (first - second).sigmoid() + first

    expected = gradients(model, loss())
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")):
        found = gradients(model, loss())
    assert worst_difference(found, expected) <= allowed(name, dtype)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bart"])
def test_lora_alone_learns(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    assert_equal(with_lora(model), batch, 5, allowed(name, dtype))


@pytest.mark.parametrize("trained", ["layers.2", "layers.1.mlp", "norm.weight", "embed_tokens", "lm_head", "layers.0.self_attn.v"])
@pytest.mark.parametrize("tied", [False, True])
def test_partly_frozen_models(trained, tied):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS, tie_word_embeddings=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or (tied and "embed_tokens" in name))
    found = assert_equal(model, batch, 5, tolerance(dtype))
    assert len(found.gradients) == sum(p.requires_grad for p in model.parameters()) > 0


AROUND = {
    "last norm alone": ("llama", ("model.norm",)),
    "upper layers and the last norm": ("llama", ("layers.2", "model.norm")),
    "last norm and head": ("gpt2", ("ln_f", "lm_head")),
    "positions before the layers, and the last layer": ("gpt2", ("wpe", "h.2")),
    "positions before the layers alone": ("opt", ("embed_positions",)),
    "encoder and the last norm": ("pegasus", ("encoder.layers", "decoder.layer_norm")),
}


@pytest.mark.parametrize("order", ["layers", None])
@pytest.mark.parametrize("which", AROUND)
def test_what_is_learned_after_the_layers_and_what_before_them(which, order):
    name, trained = AROUND[which]
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS, tie_word_embeddings=False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in key for part in trained))
    limit, expected = allowed(name, dtype), plain_twin(model, batch)
    model = model if order else checkpointed(model, False)
    if order is None:
        model.disable_input_require_grads()  # by which transformers lets everything above the embedding learn
        assert streams_of(model, batch) == [LayerStream]
    found = assert_streams(model, batch, 5, limit, expected, order=order)
    assert worst_difference({key: gradient * 0.99 for key, gradient in found.gradients.items()}, expected[1]) > NOTICED


@pytest.mark.parametrize("order", ["layers", "chunks"])
def test_no_gradient_comes_to_the_body_where_none_is_handed_to_it(order):
    """A head that reads its input as a constant: of what both share, the head's part alone is learned."""
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS, tie_word_embeddings=True)
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].detach(),))
    expected = gradients(model, loss_of(model, batch)[0])
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order)):
        found = gradients(model, loss_of(model, batch)[0])
    assert found.keys() == expected.keys() == {"model.embed_tokens.weight"}
    assert worst_difference(found, expected) <= allowed("llama", dtype)


@pytest.mark.parametrize("hooked", [True, False])
@REENTRANT
def test_checkpointed_adapters_of_upper_layers_and_a_trained_norm(reentrant, hooked):
    """hooked: whether embeddings are made to require grad, as PEFT does for re-entrant checkpoints."""
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    model = with_lora(model, ["q_proj", "up_proj"], layers_to_transform=[1, 2])
    model.get_base_model().model.norm.requires_grad_(True)
    expected = plain_twin(model, batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    getattr(model.get_base_model(), "enable_input_require_grads" if hooked else "disable_input_require_grads")()
    assert streams_of(model.get_base_model(), batch) == [LayerStream]
    assert_streams(model, batch, 5, tolerance(dtype), expected)


@pytest.mark.parametrize("also", [(), ("model.norm",)], ids=["layers alone", "and the last norm"])
def test_layers_below_the_first_that_learns_keep_no_inputs(also, monkeypatch):
    dropped, pop = [], LayerStream._all_go_backward

    def counting(self, *args):
        dropped.append(sorted(self._kept))
        return pop(self, *args)

    monkeypatch.setattr(LayerStream, "_all_go_backward", counting)
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS, num_hidden_layers=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("layers.3", "layers.2.mlp", *also)))
    stream(model, batch, 5, "layers")
    assert dropped[-1] == [2, 3]


def test_autocast_is_as_near_to_float32_as_plain_training_under_it():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS, dtype=torch.float32)
    _, exact = plain_twin(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, plain = plain_twin(model, batch)
        found = stream(model, batch, 5, "layers").gradients
    assert worst_difference(found, exact) <= 2 * worst_difference(plain, exact)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_a_gradient_that_is_there_is_added_to(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    _, once = plain_twin(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")):
        for _ in range(2):
            loss_of(model, batch)[0].backward()
    twice = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert worst_difference(twice, {key: 2 * gradient for key, gradient in once.items()}) <= allowed(name, dtype)


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 50])
@pytest.mark.parametrize("name", DROPOUT)
def test_the_gradient_is_the_slope_of_the_loss_with_dropout(name, chunk):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    limit = SLOPE_TOLERANCE.get(name, tolerance(torch.float32))
    assert slope_error(model, batch, chunk, STEP.get(name, 1e-5), "layers") <= limit


@pytest.mark.parametrize("name", DROPOUT)
def test_layers_that_run_again_with_other_masks_are_noticed(monkeypatch, name):
    monkeypatch.setattr(RandomTape, "replay", lambda self, name: None)
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    assert slope_error(model, batch, 5, STEP.get(name, 1e-5), "layers") > NOTICED


def test_two_layers_draw_different_masks():
    """And two chunks: what is drawn is what a layer alone would have drawn next."""
    drawn: list[list[bool]] = []
    model, batch, _ = model_and_batch("gpt2", lengths=LENGTHS, resid_pdrop=0.5)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout) and part.p == 0.5:
            part.register_forward_hook(lambda module, args, output: drawn.append((output == 0)[:, :2].flatten().tolist()))
    with Streaming(model, StreamingConfig(sequence_chunk_size=6, stream_order="layers")):
        drawn.clear()
        loss, _ = loss_of(model, batch)
        forward = [tuple(one) for one in drawn]
        assert len(set(forward)) == len(forward) == 2 * 2 * model.config.n_layer
        loss.backward()
        assert set(map(tuple, drawn[len(forward) :])) == set(forward)


# -- when it is taken ------------------------------------------------------------------------------------------------


def streams_of(model, batch, order=None):
    """The kinds of stream that a step runs in."""
    kinds, init = [], ChunkStream.__init__

    def noting(self, *args, **kwargs):
        if model.training:  # and not in the probe before
            kinds.append(type(self))
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkStream, "__init__", noting)
        stream(model, batch, 5, order)
    return kinds


@REENTRANT
def test_checkpointed_layers_are_streamed_by_layers(reentrant):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    assert streams_of(model, batch) == [ChunkStream]
    assert streams_of(checkpointed(model, reentrant), batch) == [LayerStream]
    assert streams_of(checkpointed(model, reentrant), batch, "chunks") == [ChunkStream]
    assert streams_of(model, batch, "layers") == [LayerStream]


def test_few_keys_of_many_heads_go_by_chunks():
    """There, keys, values and their gradients are far fewer bytes than the inputs of the layers."""
    model, batch, dtype = model_and_batch(
        "llama", lengths=LENGTHS, hidden_size=64, num_attention_heads=8, num_key_value_heads=1, head_dim=8
    )
    checkpointing = checkpointed(model, False)
    assert streams_of(checkpointing, batch) == [ChunkStream]
    assert streams_of(checkpointing, batch, "layers") == [LayerStream]
    assert_equal(checkpointing, batch, 5, allowed("llama", dtype), plain_twin(model, batch))


def test_other_ways_to_checkpoint_are_those_of_transformers():
    """Only every second layer, or with inputs on the host: a stream by layers would do something else than was asked for."""
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert streams_of(model, batch) == [ChunkStream]
    assert_streams(model, batch, 5, allowed("llama", dtype))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all_checkpointing(describe(model))
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
    assert not all_checkpointing(describe(model))


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "bloom"])
def test_layers_that_hand_on_more_go_by_chunks(name):
    model = tiny(name)
    batch = batch_of(model, "causal", "right")
    before, ours = traces(model), registered()
    with pytest.raises(UnsupportedModelError, match="stream_order=layers.*stream_order=chunks"):
        stream(model, batch, 5, "layers")
    assert traces(model) == before and registered() <= ours
    assert streams_of(checkpointed(model, False), batch) == [ChunkStream]


def test_router_logits_go_by_chunks():
    """They are noted while the body runs; the auxiliary loss must not be lost."""
    model, batch, dtype = model_and_batch("mixtral", lengths=LENGTHS)
    model.config.output_router_logits = True
    with pytest.raises(MemTuneError, match="output_router_logits=True.*stream_order=chunks"):
        stream(model, batch, 5, "layers")
    assert streams_of(checkpointed(model, False), batch) == [ChunkStream]


class Between(torch.nn.ModuleList):
    """Layers of which the body does something to what the one before has returned."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        return [lambda hidden, *args, of=layer, **kwargs: of(2 * hidden, *args, **kwargs) for layer in found]


class Reversed(torch.nn.ModuleList):
    """Layers that the body runs from the last to the first."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return list(found)[::-1] if isinstance(index, slice) else found


@pytest.mark.parametrize(
    "kind, problem",
    [(Between, "layer 1 is not given what the layer before it returned"), (Reversed, "runs layer 2 where layer 0 was expected")],
    ids=["between", "reversed"],
)
def test_a_body_that_does_more_than_run_its_layers_is_refused(kind, problem):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    model.model.layers = kind(model.model.layers)
    with pytest.raises(UnsupportedModelError, match=f"{problem}.*stream_order=chunks"):
        stream(model, batch, 5, "layers")
    assert streams_of(checkpointed(model, False), batch) == [ChunkStream]


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_hooks_belong_to_a_run_of_their_layer(layer):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")) as streaming:
        model.model.layers[layer].register_forward_hook(lambda module, args, output: 1.5 * output)
        found = step_on(model, streaming, batch).gradients
    _, expected = plain_twin(model, batch)
    assert worst_difference(found, expected) <= tolerance(torch.float64)


@pytest.mark.parametrize("kernel, kept", [("eager", "whole"), ("sdpa", "pieces")])
def test_of_masks_those_of_one_chunk_are_there_at_a_time(monkeypatch, kernel, kept):
    """Eager attention is given masks of all keys: by layers those of all chunks together would be half of a square of the row. Pieces have masks too."""
    asked, there = weakref.WeakSet(), []

    def asking(*args):
        asked.add(made := Asked(*args))
        return made

    monkeypatch.setattr(model_pass, "Asked", asking)
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    model.set_attn_implementation(kernel)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: there.append(sum(kept in vars(each) for each in asked)))
    with Streaming(model, StreamingConfig(sequence_chunk_size=3, stream_order="layers")) as streaming:
        there.clear()
        gc.collect()
        step_on(model, streaming, batch)
    assert len(there) > 3 and max(there) == 1
    asked.clear()


def test_what_is_learned_beside_the_hidden_states_is_refused():
    """A gradient that a layer's other arguments should have would be lost without a word."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    model.model.register_parameter("scale", scale)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kwargs: tuple(scale * part for part in rotary(*args, **kwargs))
    with pytest.raises(UnsupportedModelError, match="learned beside its hidden states"):
        stream(model, batch, 5, "layers")
    assert_streams(model, batch, 5, tolerance(torch.float64), order="chunks")


def test_settings():
    with pytest.raises(ConfigError, match="stream_order: got 'rows', expected one of"):
        StreamingConfig(stream_order="rows", sequence_chunk_size=4)
    assert StreamingConfig(stream_order="layers").ineffective() == {"stream_order": "without sequence_chunk_size"}
    seeking = TokenSeekingConfig(token_seeking=True, token_gradient="stream", stream_order="layers")
    assert seeking.ineffective() == {"stream_order": "with token_gradient=stream"}


def test_calls_that_are_not_for_learning_pass_through():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    before, ours = traces(model), registered()
    with torch.no_grad():
        expected = model(**batch).logits
        with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")):
            assert torch.equal(model(**batch).logits, expected)
    assert traces(model) == before and registered() <= ours


# -- what would be noticed -------------------------------------------------------------------------------------------


def test_inputs_that_change_between_the_passes_are_noticed(monkeypatch):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")) as streaming:
        put = RowTensor.put
        monkeypatch.setattr(RowTensor, "put", lambda self, part, start: put(self, 1.1 * part, start))
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) > NOTICED


def test_keys_that_are_made_wrongly_are_noticed(monkeypatch):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")) as streaming:
        attend = KeysPass.attend
        monkeypatch.setattr(KeysPass, "attend", lambda self, module, query, key, *rest: attend(self, module, query, 1.1 * key, *rest))
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) > NOTICED


# -- memory ----------------------------------------------------------------------------------------------------------

LAYERS, HEADS, KEY_HEADS, CHANNELS, CHUNK = 8, 4, 4, 8, 32
HIDDEN = HEADS * CHANNELS * 4  # bytes of a hidden state, float32
KEYS = 2 * KEY_HEADS * CHANNELS * 4  # of a token's keys and values in a layer


def peaks(tokens, order, offload=False, window=None):
    """Peak of a step's live bytes beyond weights and gradients: on the device, and at home in host memory."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=HEADS * CHANNELS, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=HEADS, sliding_window=window,
        num_key_value_heads=KEY_HEADS, head_dim=CHANNELS, vocab_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    model = MistralForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    settings = StreamingConfig(sequence_chunk_size=CHUNK, kv_offload=offload, stream_order=order)
    with Streaming(model, settings, check=False) as streaming, LiveBytes() as live:
        streaming.host = host = CountedHost(live)
        model(input_ids=ids, labels=ids).loss.backward()
    return live.peak_bytes, host.live.peak_bytes


def grown(order, offload=False):
    """Bytes of the device for each further token of the row."""
    short, long = peaks(8 * CHUNK, order, offload)[0], peaks(16 * CHUNK, order, offload)[0]
    return (long - short) / (8 * CHUNK)


BESIDE = 2 * CHANNELS * 4 + 2 * 8 + 1  # cosines and sines, ids and labels


@pytest.fixture
def small_blocks(monkeypatch):
    """What a chunk finds for earlier keys is as long as a block; in rows shorter than one it would grow as well."""
    monkeypatch.setattr(pieces, "BLOCK", CHUNK)


def test_a_token_costs_the_inputs_of_the_layers_and_the_keys_of_one(small_blocks):
    """Of all but the first, and beside them the gradient of what the body returned."""
    allowed = (LAYERS - 1 + 1) * HIDDEN + 2 * KEYS + BESIDE
    assert 0.9 * LAYERS * HIDDEN < grown("layers") <= allowed
    assert grown("chunks") > LAYERS * 2 * KEYS > allowed  # the sibling: as many key heads as heads


@pytest.mark.parametrize("window, squares", [(CHUNK // 2, 2), (2 * CHUNK, 1)])
def test_masks_of_windows_are_those_of_one_chunk(monkeypatch, small_blocks, window, squares):
    """Of the square at the border of the window, and of the chunk's own where that is not causal alone; one of them in float32, as the kernel
    takes it; and which queries look beyond the border."""
    monkeypatch.setattr(masks, "SQUARE", CHUNK)
    without, of_one = peaks(8 * CHUNK, "layers")[0], (squares + 4) * CHUNK * CHUNK + CHUNK
    assert peaks(8 * CHUNK, "layers", window=window)[0] - without == of_one
    monkeypatch.setattr(Asked, "forget", lambda self: None)
    assert peaks(8 * CHUNK, "layers", window=window)[0] - without > of_one + 4 * CHUNK * CHUNK  # the sibling: of every chunk


def test_offloaded_a_token_costs_what_one_layer_needs(small_blocks):
    allowed = HIDDEN + 2 * KEYS + BESIDE
    assert grown("layers", offload=True) <= allowed < LAYERS * HIDDEN
    _, at_home = peaks(8 * CHUNK, "layers", offload=True)
    assert at_home == (LAYERS - 1) * HIDDEN * 8 * CHUNK  # the inputs but the first, which is made again; gradients take their place


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2", "bart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_offloaded_gradients_are_those_without(name, dtype):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, dtype=dtype)
    found = []
    for offload in (True, False):
        with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers", kv_offload=offload)) as streaming:
            found.append(step_on(model, streaming, batch).gradients)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_inputs_are_copied_three_times(monkeypatch):
    """Once to the host; for the keys, but for the last chunk's, and for backward: whatever the number of chunks."""
    copied, fetch = [], HostTensor.fetch

    def counting(self, start, stop):
        copied.append(stop - start)
        return fetch(self, start, stop)

    model, batch, _ = model_and_batch("llama", lengths=(24,), num_hidden_layers=3)
    for chunk in (12, 4):
        copied.clear()
        with Streaming(model, StreamingConfig(sequence_chunk_size=chunk, stream_order="layers", kv_offload=True)) as streaming:
            with monkeypatch.context() as patch:
                patch.setattr(HostTensor, "fetch", counting)
                step_on(model, streaming, batch)
        forward, keys, again, arriving = 2 * 24, 2 * (24 - chunk), 2 * 24, 2 * 24  # but the first layer's
        assert sum(copied) == forward + keys + again + arriving


class _Runs(TorchDispatchMode):
    """How many multiply-and-adds of weights run."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            one, other = args[-2:]
            self.products += one.shape[0] * one.shape[1] * other.shape[1]
        return func(*args, **(kwargs or {}))


def products(order):
    model, batch, _ = model_and_batch("llama", lengths=(24,), intermediate_size=256)
    model = checkpointed(with_lora(model), False)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4, stream_order=order)), _Runs() as seen:
        loss_of(model, batch)[0].backward()
    return seen.products


def test_no_layer_runs_forward_three_times():
    """Four units of work (two forward, two backward, which with LoRA is nearly one) and projections, where by chunks it is one more."""
    assert products("layers") < 0.82 * products("chunks")
