"""Exact streaming is a theorem about gradients: chunk by chunk from the last to the first, they equal plain backpropagation."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core import pieces
from hf_memtune.core.logits import LazyLogits
from hf_memtune.core.owed import OwedGradients
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.methods.seeking.targets import LABEL_NAMES
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from tests.support.heads import PROBLEMS, classified
from tests.support.packing import packed_batch, unpacked
from tests.support.removal import registered, traces
from tests.support.stepping import loss_of, model_and_batch, plain_twin, seeking_on, step_on, stream
from tests.support.streaming import LENGTHS, allowed, are_made, assert_embeddings_learn, assert_streams, cut_small, own_loss
from tests.support.tiny_models import CAUSAL, tiny_model
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, worst_difference

MASKED_WITHOUT_POSITIONS = ("gpt-oss", "afmoe")  # by transformers, so that packed rows see one another in plain training
NAMES = [*CAUSAL, "llama4", "gpt-oss", "cohere2", "deepseek-v3", "afmoe"]
ENCODER_DECODERS = ["bart", "pegasus", "m2m100"]
SIDES = ["right", "left"]
# Of rows of 12 tokens: one, a divisor, none, the row, more than the row; and whether earlier keys are cut into squares and blocks, as in long rows.
CASES = [("right", 1, False), ("left", 4, True), ("right", 5, True), ("left", 5, False), ("right", 12, False), ("left", 50, False)]


# -- causal models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, chunk, is_cut", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_plain_backpropagation(monkeypatch, name, side, chunk, is_cut):
    if is_cut:
        cut_small(monkeypatch)
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    if name == "gemma2":
        batch["labels"] = without_prediction_from_padding(batch)
    found = assert_streams(model, batch, chunk, allowed(name, dtype))
    assert found.heard.chunks == [-(-12 // chunk)]


def without_prediction_from_padding(batch):
    """Eager attention lets a token that sees nothing, at left padding, see everything: the whole row, or its chunk's prefix."""
    return batch["labels"].masked_fill(batch["attention_mask"].cumsum(1) == 1, -100)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_padding_or_mask(name):
    """Where the kernel applies the causal mask by itself, and makes none."""
    model, batch, dtype = model_and_batch(name, lengths=(12, 12))
    del batch["attention_mask"]
    assert_streams(model, batch, 5, allowed(name, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention(name):
    # eager attention with rows that see nothing is NaN in transformers itself, in float64: a window past the padding
    model, batch, _ = model_and_batch(name, _attn_implementation="eager", sliding_window=8, lengths=LENGTHS)
    assert_streams(model, batch, 5, tolerance(torch.float64, float32_inside=True))


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_in_place_of_ids_and_their_gradient(name):
    assert_embeddings_learn(name, 5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MASKED_WITHOUT_POSITIONS])
def test_packed_rows(name):
    assert_streams(tiny_model(name), packed_batch(), 4, allowed(name))


@pytest.mark.parametrize("chunk", [4, 50])  # also of rows of one chunk, which take the model's own way
@pytest.mark.parametrize("name", MASKED_WITHOUT_POSITIONS)
def test_packed_rows_of_models_that_do_not_tell_them_apart_are_refused(name, chunk):
    with pytest.raises(MemTuneError, match="do not tell them apart.*Leave packing out"):
        stream(tiny_model(name), packed_batch(), chunk)
    (row, *_) = unpacked(packed_batch())
    assert_streams(tiny_model(name), row | {"position_ids": torch.arange(row["input_ids"].shape[1])[None]}, 4, allowed(name))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_packed_sequences_learn_as_if_each_had_a_row(name):
    model, batch = tiny_model(name), packed_batch()
    found = stream(model, batch, 4)
    alone = sum(plain_loss_sum(model, row) for row in unpacked(batch)) / (batch["labels"][:, 1:] != -100).sum()
    assert worst_difference(found.gradients, gradients(model, alone)) <= allowed(name)


def plain_loss_sum(model, row):
    logits = model(input_ids=row["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), row["labels"][:, 1:].flatten(), reduction="sum")


def test_packed_rows_that_are_not_kept_apart_are_noticed():
    model, batch = tiny_model("llama"), packed_batch()
    _, mixed = plain_twin(model, {key: value for key, value in batch.items() if key != "position_ids"})
    assert worst_difference(stream(model, batch, 4).gradients, mixed) > NOTICED


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "gpt-oss"])
def test_logits_that_are_made_give_the_same_gradients(name):
    """As for a loss that is no cross entropy, or one that the user takes of the values."""
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    found = assert_streams(model, batch, 5, allowed(name, dtype), made=True)
    assert are_made(found.outputs.logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "gpt2", "bart"])
def test_the_loss_is_taken_without_logits(name):
    """Also where the model does something to them: one has a softcap, one a scale, one a bias that is no parameter."""
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    found = stream(model, batch, 5)
    assert isinstance(found.outputs.logits, LazyLogits) and not are_made(found.outputs.logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_the_outputs_are_those_of_the_model(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    plain = model(**batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)):
        found = model(**batch)
        pair = model(**batch, return_dict=False)
    assert found.keys() - {"past_key_values"} == plain.keys() - {"past_key_values"}
    for ours in (found.loss, pair[0]):
        assert abs(ours - plain.loss) <= tolerance(torch.float32) * plain.loss  # taken in float32
    for ours in (found.logits, pair[1]):
        assert (ours - plain.logits).norm() <= allowed(name, dtype) * plain.logits.norm()
        assert (ours - plain.logits.roll(1, 1)).norm() > NOTICED * plain.logits.norm()


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("unlabelled", [(slice(1, 2), slice(None)), (slice(None), slice(4, 9)), (slice(None), slice(0, 9))], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_and_chunks_without_labels(name, unlabelled, made):
    """A row, a chunk in the middle, and all chunks but the last: what is without labels is context, and learns as such."""
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    batch["labels"][unlabelled] = -100
    assert_streams(model, batch, 4, allowed(name, dtype), made=made)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_a_batch_without_labels_costs_nothing(name):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    if name == "bart":
        batch["decoder_input_ids"] = batch["labels"].clamp_min(1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = stream(model, batch, 4)
    assert found.loss == 0 and found.gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in found.gradients.values())


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_label_smoothing(name, made):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    expected = plain_twin(model, batch, label_smoothing=0.1)
    assert_streams(model, batch, 4, allowed(name, dtype), expected, made, label_smoothing=0.1)
    assert worst_difference(stream(model, batch, 4).gradients, expected[1]) > NOTICED


# -- encoder-decoders ------------------------------------------------------------------------------------------------


ENCODED = [("right", 1, False), ("left", 4, False), ("right", 4, True), ("right", 11, True), ("left", 50, False)]


@pytest.mark.parametrize("side, chunk, masked", ENCODED)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_decoders_stream_and_encoders_stay_whole(name, side, chunk, masked):
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    if masked:
        batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    assert_streams(model, batch, chunk, allowed(name, dtype))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_that_learns_from_the_first_chunk_alone_is_noticed(monkeypatch, name):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    go_backward = ChunkStream._go_backward

    def forgetting(self, number, cotangents):
        for leaf in self.call.leaves:
            leaf.grad = None
        go_backward(self, number, cotangents)

    monkeypatch.setattr(ChunkStream, "_go_backward", forgetting)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4), check=False) as streaming:
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) > NOTICED


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_encoder_runs_once_as_it_is(name):
    """What its layers draw at random, layers that are left out too, is what plain training draws."""
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    encoder = model.get_encoder()
    encoder.layerdrop = model.config.encoder_layerdrop = 0.5
    for layer in encoder.layers:
        layer.dropout = 0.3

    def drawn(seed, take):
        torch.manual_seed(seed)
        return take()

    expected = drawn(0, lambda: plain_twin(model, batch))
    found = drawn(0, lambda: stream(model, batch, 4))
    assert worst_difference(found.gradients, expected[1]) <= allowed(name, dtype)
    assert worst_difference(drawn(1, lambda: stream(model, batch, 4)).gradients, expected[1]) > NOTICED
    runs = []
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)) as streaming:
        encoder.register_forward_hook(lambda *_: runs.append(1))
        step_on(model, streaming, batch)
    assert len(runs) == 1


# -- heads with a loss for a row, and for each token -----------------------------------------------------------------


@pytest.mark.parametrize("problem, chunk", [*((problem, 4) for problem in PROBLEMS), ("single label", 1), ("single label", 13)])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_sequence_classification(name, side, problem, chunk):
    """The rows' pooled positions lie in different chunks."""
    model, batch, dtype = classified(name, side, problem)
    assert_streams(model, batch, chunk, tolerance(dtype), own_loss(model, batch))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_question_answering(name):
    model, batch, dtype = model_and_batch(name, head="question_answering")
    assert_streams(model, batch, 4, tolerance(dtype), own_loss(model, batch))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_token_classification(name, side):
    model, batch, dtype = model_and_batch(name, side, "token_classification")
    assert_streams(model, batch, 4, tolerance(dtype))


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_a_body_that_is_told_of_another_row_is_noticed(head):
    """The gradient of the head's input reaches the body by hand, chunk by chunk: rows that are mixed up must not pass."""
    model, batch, _ = model_and_batch("llama", head=head)
    other = {key: value.flip(0) if key in LABEL_NAMES else value for key, value in batch.items()}
    other |= {"start_positions": batch["end_positions"], "end_positions": batch["start_positions"]} if "end_positions" in batch else {}
    assert worst_difference(stream(model, batch, 4).gradients, own_loss(model, other)[1]) > NOTICED


# -- siblings: what the comparisons above must notice ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *ENCODER_DECODERS])
def test_a_stream_that_pays_nothing_back_is_noticed(monkeypatch, name):
    """Chunks whose keys and values learn from their own queries alone: truncated backpropagation."""
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    monkeypatch.setattr(OwedGradients, "book", lambda *args: None)
    with Streaming(
        model, StreamingConfig(sequence_chunk_size=5), check=False
    ) as streaming:  # Llama 4's attention has borders every 4 tokens
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) > NOTICED
    with Streaming(model, StreamingConfig(sequence_chunk_size=50), check=False) as streaming:
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) <= allowed(name)
    with pytest.raises(UnsupportedModelError, match="another gradient in chunks: that of 8 tokens"):
        stream(model, batch, 5)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "deepseek-v3"])
def test_a_block_of_a_piece_that_is_left_out_is_noticed(monkeypatch, name):
    model, batch, _ = model_and_batch(name, "left", lengths=LENGTHS)
    _, expected = plain_twin(model, batch)
    cut_small(monkeypatch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4), check=False) as streaming:
        blocks = pieces.Piece.blocks
        monkeypatch.setattr(pieces.Piece, "blocks", lambda self: list(blocks(self))[-1:])
        assert worst_difference(step_on(model, streaming, batch).gradients, expected) > NOTICED


# -- calls and losses ------------------------------------------------------------------------------------------------


@pytest.fixture
def streaming():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    made = Streaming(model, StreamingConfig(sequence_chunk_size=4))
    yield made, model, batch
    made.remove()


def other_batch(batch):
    return {name: value.flip(0) if name == "labels" else value.flip(1) for name, value in batch.items() if name != "attention_mask"}


@pytest.mark.parametrize("kind", ["sum", "product", "one after the other"])
def test_a_model_may_be_called_several_times(kind):
    """Whatever the loss makes of the calls, and in whatever order they go backward."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    other = other_batch(batch)

    def take():
        first, second = (loss_of(model, each)[0] for each in (batch, other))
        if kind == "one after the other":
            second.backward()
            return first
        return first + second if kind == "sum" else first * second

    expected = summed(model, take)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)):
        found = summed(model, take)
    assert worst_difference(found, expected) <= tolerance(torch.float64)
    assert worst_difference(plain_twin(model, batch)[1], expected) > NOTICED


def summed(model, take):
    """Gradients of all that goes backward in `take`, and of the loss that it returns."""
    model.zero_grad(set_to_none=True)
    take().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def hidden_penalty(outputs, labels):
    return outputs.logits.log_softmax(-1).square().mean()


def scaled_and_weighed(outputs, labels):
    weights = torch.arange(1.0, labels.shape[1], dtype=torch.float64)
    losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return 3 * (losses * weights).sum()


def of_the_last_token(outputs, labels):
    return outputs.logits[:, -1].logsumexp(-1).sum()


@pytest.mark.parametrize("loss", [hidden_penalty, scaled_and_weighed, of_the_last_token])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_any_loss(name, loss):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    take = lambda: loss(model(**batch), batch["labels"])  # noqa: E731
    expected = gradients(model, take())
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)):
        found = gradients(model, take())
    assert worst_difference(found, expected) <= tolerance(dtype)
    assert worst_difference(plain_twin(model, batch)[1], expected) > NOTICED


def test_a_second_backward_of_one_call_is_refused(streaming):
    _, model, batch = streaming
    loss = model(**batch).logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(MemTuneError, match="a second time"):
        loss.backward()


def test_losses_of_one_call_may_be_added_up(streaming):
    _, model, batch = streaming

    def take():
        outputs = model(**batch)
        return outputs.loss + 0.1 * outputs.logits.square().mean()

    found = gradients(model, take())
    streaming[0].remove()
    assert worst_difference(found, gradients(model, take())) <= tolerance(torch.float32)  # the model takes its loss in float32


def test_without_gradient_and_in_evaluation_the_model_is_itself(streaming):
    _, model, batch = streaming
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
    model.eval()
    found = model(**batch)
    assert type(found.logits) is torch.Tensor
    assert worst_difference(gradients(model, found.loss), own_loss(model, batch)[1]) == 0


@pytest.mark.parametrize("method, stacks", [("streaming", {"decoder"}), ("cut", {"encoder", "decoder"})])
def test_of_an_encoder_that_ran_before_no_keys_are_stored(method, stacks, monkeypatch):
    """Every pass makes those of cross attention anew. Where chosen tokens of the encoder run by themselves, the others' are wanted."""
    model, batch, _ = model_and_batch("bart")
    on = Streaming(model, StreamingConfig(sequence_chunk_size=4)) if method == "streaming" else seeking_on(model)
    written, write = set(), KeyValueStore.write
    monkeypatch.setattr(KeyValueStore, "write", lambda self, of, *args: written.add(of) or write(self, of, *args))
    with on:
        step_on(model, on, batch)
        assert {on.router.places.stack_of_key(of) for of in written} == stacks


@pytest.mark.parametrize("scorer", ["combined", "random", "true_gradient"])
def test_tokens_are_chosen_of_a_decoder_whose_encoder_ran_before(scorer):
    """encoder_outputs in the batch: the states are the caller's own, all of them, with or without a gradient of theirs."""
    model, batch, dtype = model_and_batch("bart")
    encoded = model.model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
    given = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    with seeking_on(model, token_scorer=scorer, token_ratio=0.999) as seeking:  # all tokens, but through the method
        found = own_loss_and_gradients(model, given)
        chosen = dict(seeking.last_selection or {}) if hasattr(seeking, "last_selection") else {"decoder": None}
    loss, expected = own_loss_and_gradients(model, given)
    assert set(chosen) == {"decoder"} and abs(found[0] - loss) <= 1e-5
    assert worst_difference(found[1], expected) <= tolerance(dtype, float32_inside=True)


def own_loss_and_gradients(model, batch):
    loss = model(**batch).loss
    names, trained = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(names, gradients) if g is not None}


def test_the_modules_are_looked_through_once_a_call(monkeypatch):
    model, batch, _ = model_and_batch("llama", lengths=(13, 9))
    walks, kind = [], type(model.model)
    original = kind.modules
    monkeypatch.setattr(kind, "modules", lambda self: walks.append(1) or original(self), raising=False)

    def walked(chunk):
        with Streaming(model, StreamingConfig(sequence_chunk_size=chunk)) as on:
            walks.clear()
            step_on(model, on, batch)
            return len(walks)

    assert walked(1) == walked(7) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_is_turned_on_before_backward(reentrant):
    model, batch, dtype = model_and_batch("llama", lengths=(13, 9))
    model.enable_input_require_grads()
    loss, expected = plain_twin(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)):
        found = loss_of(model, batch)[0]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert worst_difference(gradients(model, found), expected) <= tolerance(dtype)


def test_a_frozen_model_is_itself(streaming):
    _, model, batch = streaming
    model.requires_grad_(False)
    assert not model(**batch).loss.requires_grad


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "modernbert"])
def test_bidirectional_models_are_refused_with_the_reason(name):
    model, _, _ = model_and_batch(name)
    before, names = traces(model), registered()
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*attends to later ones.*sequence_chunk_size"):
        Streaming(model, StreamingConfig(sequence_chunk_size=4))
    assert traces(model) == before and registered() <= names


def test_streaming_without_a_chunk_size_is_refused():
    with pytest.raises(ConfigError, match="sequence_chunk_size"):
        Streaming(tiny_model("llama"), StreamingConfig())


# -- nothing is left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bart"])
def test_nothing_is_left(name, checkpointing):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    if checkpointing:
        model.gradient_checkpointing_enable()
    list(model.modules())[-1].training = False
    untouched = copy.deepcopy(model)
    before, names = traces(model), registered()
    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=4))
    between = traces(model)
    for _ in range(2):
        step_on(model, streaming, batch)
        assert traces(model) == between != before
    streaming.remove()
    assert registered() <= names and traces(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, untouched(**batch).logits)


@pytest.mark.parametrize("failing", [0, 2, 3, 4])
def test_a_step_that_fails_leaves_nothing_and_the_next_one_is_right(streaming, failing):
    """In the context pass, in the last chunk, which runs with gradient in forward, and in backward: layer 1 runs once for each."""
    streaming, model, batch = streaming
    before = traces(model)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == failing + 1:
            raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        step_on(model, streaming, batch)
    hook.remove()
    assert traces(model) == before
    assert worst_difference(step_on(model, streaming, batch).gradients, plain_twin_without(streaming, batch)) <= tolerance(torch.float64)


def plain_twin_without(streaming, batch):
    model = streaming.architecture.head_model
    streaming.remove()
    return plain_twin(model, batch)[1]


def test_a_removed_streaming_is_out_of_the_way(streaming):
    """A loss that was taken before still has its gradient."""
    streaming, model, batch = streaming
    loss, _ = loss_of(model, batch)
    streaming.remove()
    streaming.remove()
    found = gradients(model, loss)
    assert type(model(**batch).logits) is torch.Tensor
    assert worst_difference(found, plain_twin(model, batch)[1]) <= tolerance(torch.float64)
    with pytest.raises(MemTuneError, match="removed"):
        streaming.router


def test_token_counts_are_of_real_tokens(streaming):
    streaming, model, batch = streaming
    assert step_on(model, streaming, batch).heard.counts["seen"] == sum(LENGTHS) < batch["input_ids"].numel()
