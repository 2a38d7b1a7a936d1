"""Exact streaming together with what people train with: adapters, frozen layers, quantised weights, checkpointing, half precision,
dropout; and what it is for, memory."""

import copy

import pytest
import torch

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core import owed
from hf_memtune.core.logits import LazyLogits
from hf_memtune.core.rng import RandomTape
from hf_memtune.core.store import KeyValueStore
from hf_memtune.memory import LiveBytes, SavedBytes
from hf_memtune.methods.attention import passes
from hf_memtune.methods.attention.passes import ChunkPass
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from tests.support.composition import REENTRANT, checkpointed, whole_error, with_lora
from tests.support.slopes import DROPOUT, SLOPE_TOLERANCE, STEP, seeded, slope_error
from tests.support.stepping import model_and_batch, plain_twin, step_on, stream
from tests.support.streaming import LENGTHS, allowed, assert_streams, own_loss
from tests.support.tiny_models import batch_for
from tests.support.tolerances import NOTICED, RELATIVE, tolerance
from tests.support.twin import gradients, worst_difference

# -- adapters and frozen layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bart"])
def test_lora_alone_learns_and_equals_plain_backpropagation(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    model = with_lora(model, ["c_attn", "c_fc"] if name == "gpt2" else "all-linear")
    found = assert_streams(model, batch, 5, allowed(name, dtype))
    assert found.gradients and all("lora_" in parameter for parameter in found.gradients)


def test_lora_around_the_head():
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    model = with_lora(model, ["q_proj", "down_proj", "lm_head"])
    found = assert_streams(model, batch, 5, tolerance(dtype))
    assert not isinstance(found.outputs.logits, LazyLogits)  # the head is no longer one product
    assert any("lm_head" in parameter for parameter in found.gradients)


def test_adapters_of_the_wrong_weights_are_noticed():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    untouched = copy.deepcopy(model)
    _, expected = plain_twin(with_lora(untouched, seed=6), batch)
    assert worst_difference(stream(with_lora(model), batch, 5).gradients, expected) > NOTICED


TRAINED = {
    "the top layer": ("layers.2.", "norm", "lm_head"),
    "the head": ("lm_head",),
    "keys": ("k_proj",),
    "queries": ("q_proj",),
    "values of one layer": ("layers.1.self_attn.v_proj",),
    "queries of the last layer": ("layers.2.self_attn.q_proj",),
    "embeddings": ("embed_tokens",),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_partly_frozen_models(trained, tied):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS, tie_word_embeddings=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[trained]) or (tied and "embed_tokens" in name))
    found = assert_streams(model, batch, 5, tolerance(dtype))
    assert len(found.gradients) == sum(p.requires_grad for p in model.parameters()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_tied_embeddings(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert_streams(model, batch, 4, tolerance(dtype))


def test_a_tied_embedding_that_learns_as_a_head_alone_is_noticed():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS, tie_word_embeddings=True)
    _, expected = plain_twin(model, batch)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    assert worst_difference(stream(model, batch, 4).gradients, expected) > NOTICED


# -- activation checkpointing ----------------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2", "opt", "bart"])
def test_checkpointing_changes_no_gradient(name, reentrant):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    expected = plain_twin(model, batch)
    assert_streams(checkpointed(model, reentrant), batch, 5, allowed(name, dtype), expected)


@REENTRANT
def test_checkpointed_lora(reentrant):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    model = with_lora(model)
    expected = plain_twin(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_streams(model, batch, 5, tolerance(dtype), expected)


@REENTRANT
def test_a_checkpointed_classifier(reentrant):
    model, batch, dtype = model_and_batch("llama", head="sequence_classification")
    expected = own_loss(model, batch)
    assert_streams(checkpointed(model, reentrant), batch, 4, tolerance(dtype), expected)


# -- half precision and quantised weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bart"])
def test_autocast_is_as_near_to_float32_as_plain_training_under_it(name, chunk, checkpointing):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, dtype=torch.float32)
    loss, expected = plain_twin(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = plain_twin(model, batch)
        found = stream(checkpointed(model, True) if checkpointing else model, batch, chunk)
    assert all(g.dtype == torch.float32 for g in found.gradients.values())
    assert abs(found.loss - loss) <= RELATIVE[torch.bfloat16] * loss
    assert whole_error(found.gradients, expected) <= RELATIVE[torch.bfloat16]
    assert whole_error(found.gradients, expected) <= 1.5 * whole_error(plain, expected)


@pytest.mark.parametrize("order", ["chunks", "layers"])
def test_keys_are_stored_in_the_dtype_in_which_autocast_attends(order, monkeypatch):
    """Rotary embeddings leave them in float32, which is twice the bytes that attention reads."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS, dtype=torch.float32)
    seen, write = set(), KeyValueStore.write
    monkeypatch.setattr(KeyValueStore, "write", lambda store, of, *pair: (seen.update(p.dtype for p in pair[:2]), write(store, of, *pair)))
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order)):
        for dtype in (torch.float32, torch.bfloat16):
            seen.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            assert seen == {dtype}


@pytest.mark.parametrize("order", ["chunks", "layers"])
def test_what_leaves_autocast_goes_backward_in_its_own_precision(order):
    """As in plain training, whose backward comes after autocast: under it, products in float32 would have a gradient rounded to bfloat16."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS, dtype=torch.float32)
    seen, own = [], model.model.layers[1].mlp.forward

    def in_float32(hidden):
        with torch.autocast("cpu", enabled=False):
            made = own(hidden.float())
        if made.requires_grad:
            made.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
        return made

    model.model.layers[1].mlp.forward = in_float32
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order)):
        seen.clear()  # of the probe
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        outside, seen[:] = list(seen), []
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
    assert outside == [False] * 3
    assert seen == [True] * 3


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_bfloat16_is_as_near_to_float64_as_plain_training_in_bfloat16(chunk):
    """What is owed is summed over as many as 48 chunks."""
    model, batch, dtype = model_and_batch("llama", lengths=(48, 40), dtype=torch.bfloat16)
    _, plain = plain_twin(model, batch)
    loss, expected = plain_twin(copy.deepcopy(model).double(), batch)
    found = stream(model, batch, chunk)
    assert abs(found.loss - loss) <= tolerance(dtype) * loss
    assert whole_error(found.gradients, expected) <= tolerance(dtype)
    assert whole_error(found.gradients, expected) <= 1.5 * whole_error(plain, expected)


def test_truncated_backpropagation_is_further_away_than_bfloat16_allows():
    model, batch, dtype = model_and_batch("llama", lengths=(48, 40))
    _, expected = plain_twin(model, batch)
    pieces = [{name: value[:, start : start + 8] for name, value in batch.items()} for start in range(0, 48, 8)]
    truncated = gradients(model, sum(model(**piece).loss for piece in pieces))
    assert whole_error(truncated, expected) > RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qlora(quantised_llama, dtype):
    model = with_lora(quantised_llama(dtype))
    batch = batch_for(model, lengths=LENGTHS)
    found = stream(model, batch, 5)
    assert found.gradients and all("lora_" in parameter for parameter in found.gradients)
    loss, expected = plain_twin(model, batch)
    assert abs(found.loss - loss) <= tolerance(dtype) * loss
    assert whole_error(found.gradients, expected) <= tolerance(dtype)


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(RandomTape, "replay", lambda self, name: None)


@pytest.mark.parametrize("chunk", [4, 5, 50])
@pytest.mark.parametrize("name", DROPOUT)
def test_the_gradient_is_the_slope_of_the_loss_with_dropout(name, chunk):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    limit = SLOPE_TOLERANCE.get(name, tolerance(torch.float32))
    assert slope_error(model, batch, chunk, STEP.get(name, 1e-5)) <= limit


@pytest.mark.parametrize("name", DROPOUT)
def test_chunks_that_run_again_with_other_masks_are_noticed(forgetful, name):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    assert slope_error(model, batch, 4, STEP.get(name, 1e-5)) > 10 * NOTICED


def dropping_lora():
    model, batch, _ = model_and_batch("gpt2", lengths=LENGTHS)
    return with_lora(model, ["c_attn", "c_fc"], lora_dropout=0.3), batch


def test_the_gradient_is_the_slope_of_the_loss_with_lora_dropout():
    assert slope_error(*dropping_lora(), 4) <= tolerance(torch.float32)


def test_lora_that_runs_again_with_other_masks_is_noticed(forgetful):
    assert slope_error(*dropping_lora(), 4) > NOTICED


def test_the_gradient_is_the_slope_of_a_classifiers_loss_with_dropout():
    model, batch, _ = model_and_batch("gpt2", head="sequence_classification", **DROPOUT["gpt2"])
    assert slope_error(model, batch, 4) <= tolerance(torch.float32)


def test_a_classifier_that_runs_again_with_other_masks_is_noticed(forgetful):
    model, batch, _ = model_and_batch("gpt2", head="sequence_classification", **DROPOUT["gpt2"])
    assert slope_error(model, batch, 4) > NOTICED


@REENTRANT
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_replayed_when_recomputed(name, reentrant):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    kept = seeded(model, batch, 4, order="chunks")
    again = seeded(checkpointed(model, reentrant), batch, 4, order="chunks")
    assert abs(again.loss - kept.loss) <= tolerance(dtype) * kept.loss
    assert worst_difference(again.gradients, kept.gradients) <= tolerance(dtype)


@pytest.mark.parametrize("name", DROPOUT)
def test_two_steps_draw_different_masks(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS, **DROPOUT[name])
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)) as streaming:
        torch.manual_seed(3)
        first, second = (step_on(model, streaming, batch).gradients for _ in range(2))
        torch.manual_seed(3)
        again = step_on(model, streaming, batch).gradients
    assert worst_difference(again, first) <= tolerance(dtype)
    assert worst_difference(second, first) > NOTICED


@pytest.mark.parametrize("name", DROPOUT)
def test_replaying_does_not_set_the_clock_back(name):
    """Or random numbers that come after backward, of the next step, would be those of a chunk again."""
    model, batch, _ = model_and_batch(name, lengths=(12, 12), **DROPOUT[name])
    before, after_forward = torch.get_rng_state(), []
    hook = model.register_forward_hook(lambda *_: after_forward.append(torch.get_rng_state()))
    stream(model, batch, 4)
    hook.remove()
    assert torch.equal(torch.get_rng_state(), *after_forward)
    assert not torch.equal(torch.get_rng_state(), before)


# -- memory ----------------------------------------------------------------------------------------------------------


def saved_by_a_chunk(model, batch):
    """Bytes that the chunk before the last, of 8 tokens, saves for backward, but for stored keys and values and the batch's own."""
    found, run = [], ChunkStream._run

    def counting(self, number, span, stores):
        if span.start != self.rows.length - 16:
            return run(self, number, span, stores)
        with SavedBytes(exclude=[model, batch["input_ids"], self.rows.positions, *self.store.tensors()]) as saved:
            ran = run(self, number, span, stores)
        found.append(saved.current_bytes)
        return ran

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkStream, "_run", counting)
        stream(model, batch, 8)
    return found[0]


def growth(name):
    """Bytes that a chunk saves more for each 8 tokens that are before it, in rows of 24, 40 and 72 tokens."""
    sizes = []
    for tokens in (24, 40, 72):
        model, batch, _ = model_and_batch(name, lengths=(tokens, tokens - 3), dtype=torch.float32, max_position_embeddings=128)
        sizes.append(saved_by_a_chunk(model, batch))
    return (sizes[1] - sizes[0]) / 2, (sizes[2] - sizes[1]) / 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gpt2", "opt"])
def test_a_chunk_saves_nothing_of_the_prefix(name):
    assert growth(name) == (0, 0)


def test_a_copy_of_the_prefix_is_noticed(monkeypatch):
    """As autograd would save one, of keys and values that stored and live ones are put together to."""
    identity = owed.Streamed.forward
    monkeypatch.setattr(owed.Streamed, "forward", staticmethod(lambda ctx, *args: identity(ctx, *args).clone()))
    monkeypatch.setattr(ChunkPass, "prefix_of", lambda *args, **kwargs: None)
    monkeypatch.setattr(passes, "checkpoint", lambda run, *args, **kwargs: run(*args))
    keys_and_values = 2 * 3 * 2 * 2 * 8 * 8 * 4  # in 3 layers of 2 heads of 8, of 2 rows and 8 tokens, float32
    assert min(growth("llama")) >= keys_and_values


def peak(step):
    with LiveBytes() as live:
        step()
    return live.peak_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_peak_of_a_step_is_far_below_that_of_plain_training(name):
    model, batch, _ = model_and_batch(name, lengths=(128,), dtype=torch.float32, max_position_embeddings=128)
    streamed, plain = peak(lambda: stream(model, batch, 8)), peak(lambda: own_loss(model, batch))
    assert streamed < 0.5 * plain
    assert peak(lambda: stream(model, batch, 128)) > 2 * streamed  # the sibling: in one chunk it is not
