"""Exact streaming is a theorem about gradients: chunk by chunk from the last to the first, they equal plain backpropagation."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core.owed import OwedGradients
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.methods import chunk_stream
from hf_memtune.methods.seeking.targets import LABEL_NAMES
from tests.methods.stepping import has_float32_inside, model_and_batch, plain_twin, stream, take_turns
from tests.methods.test_heads import PROBLEMS, classified
from tests.methods.test_packing import packed_batch, unpacked
from tests.methods.test_removal import registered, traces
from tests.methods.tiny_models import CAUSAL, tiny_model
from tests.methods.twin import gradients, worst_difference
from tests.tolerances import NOTICED, tolerance

NAMES = [*CAUSAL, "llama4", "gpt-oss", "cohere2", "deepseek-v3"]
ENCODER_DECODERS = ["bart", "pegasus", "m2m100"]
LENGTHS = (12, 9)
SIDES = ["right", "left"]
# Of rows of 12 tokens: one, a divisor, none, the row, more than the row.
CASES = [("right", 1), ("left", 4), ("right", 5), ("left", 5), ("right", 12), ("left", 50)]


def allowed(name, dtype=torch.float64):
    """DeepSeek's router is in float32 whatever the model is called in."""
    return tolerance(dtype, has_float32_inside(name) or name == "deepseek-v3")


def assert_streams(model, batch, chunk, limit, expected=None, **settings):
    """Loss and all gradients of a stream equal those of plain backpropagation, or others that are expected."""
    loss, wanted = expected or plain_twin(model, batch)
    found = stream(model, batch, chunk, **settings)
    assert found.gradients.keys() == wanted.keys()
    assert worst_difference(found.gradients, wanted) <= limit
    assert abs(found.loss - loss) <= limit * max(1.0, abs(loss))
    return found


def own_loss(model, batch):
    """The model's own loss of a plain forward, and its gradients."""
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


# -- causal models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, chunk", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_plain_backpropagation(name, side, chunk):
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    if name == "gemma2":
        batch["labels"] = without_prediction_from_padding(batch)
    found = assert_streams(model, batch, chunk, allowed(name, dtype))
    assert found.turns == -(-12 // chunk)


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
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    expected = plain_twin(model, batch)
    plain, batch["inputs_embeds"].grad = batch["inputs_embeds"].grad, None
    assert_streams(model, batch, 5, allowed(name, dtype), expected)
    assert worst_difference({"embeds": batch["inputs_embeds"].grad}, {"embeds": plain}) <= allowed(name, dtype)
    assert worst_difference({"embeds": batch["inputs_embeds"].grad.roll(1, 1)}, {"embeds": plain}) > NOTICED


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt-oss"])  # which transformers masks without its positions
def test_packed_rows(name):
    assert_streams(tiny_model(name), packed_batch(), 4, allowed(name))


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt-oss"])
def test_packed_sequences_learn_as_if_each_had_a_row(name):
    model, batch = tiny_model(name), packed_batch()
    found = stream(model, batch, 4)
    alone = sum(plain_loss_sum(model, row) for row in unpacked(batch)) / found.step.loss_tokens
    assert worst_difference(found.gradients, gradients(model, alone)) <= tolerance(torch.float64)


def plain_loss_sum(model, row):
    logits = model(input_ids=row["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), row["labels"][:, 1:].flatten(), reduction="sum")


def test_packed_rows_that_are_not_kept_apart_are_noticed():
    model, batch = tiny_model("llama"), packed_batch()
    _, mixed = plain_twin(model, {key: value for key, value in batch.items() if key != "position_ids"})
    assert worst_difference(stream(model, batch, 4).gradients, mixed) > NOTICED


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "gpt-oss"])
def test_logits_of_the_model_itself_give_the_same_gradients(name):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    found = assert_streams(model, batch, 5, allowed(name, dtype), whole_logits=True)
    assert not found.step.fused


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "gpt2"])
def test_the_head_gives_the_loss_only_where_it_is_plain(name):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    assert stream(model, batch, 5).step.fused == (name not in ("gemma2", "cohere2"))  # one has a softcap, one a scale


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("unlabelled", [(slice(1, 2), slice(None)), (slice(None), slice(4, 9)), (slice(None), slice(0, 9))], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_and_chunks_without_labels(name, unlabelled, whole_logits):
    """A row, a chunk in the middle, and all chunks but the last: what is without labels is context, and learns as such."""
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    batch["labels"][unlabelled] = -100
    assert_streams(model, batch, 4, allowed(name, dtype), whole_logits=whole_logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_a_batch_without_labels_costs_nothing(name):
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    if name == "bart":
        batch["decoder_input_ids"] = batch["labels"].clamp_min(1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = stream(model, batch, 4)
    assert found.loss == 0 and found.gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in found.gradients.values())


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_label_smoothing(name, whole_logits):
    model, batch, dtype = model_and_batch(name, lengths=LENGTHS)
    expected = plain_twin(model, batch, label_smoothing=0.1)
    assert_streams(model, batch, 4, allowed(name, dtype), expected, label_smoothing=0.1, whole_logits=whole_logits)
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
    monkeypatch.setattr(chunk_stream.Joined, "apply", lambda value, owed: value)
    assert worst_difference(stream(model, batch, 4).gradients, expected) > NOTICED


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
    own = lambda self, key, gradient, tokens: gradient[:, :, tokens.start : tokens.stop]  # noqa: E731
    monkeypatch.setattr(OwedGradients, "settle", own)
    monkeypatch.setattr(OwedGradients, "is_awaited", property(lambda self: False, lambda self, value: None), raising=False)  # or it refuses
    found = stream(model, batch, 5)  # Llama 4's attention has borders of its own, every 4 tokens
    assert worst_difference(found.gradients, expected) > NOTICED
    assert worst_difference(stream(model, batch, 50).gradients, expected) <= allowed(name)


# -- protocol --------------------------------------------------------------------------------------------------------


@pytest.fixture
def streaming():
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    made = Streaming(model, StreamingConfig(sequence_chunk_size=4))
    yield made, model, batch
    made.remove()


def backward(step, model):
    (step.loss_sum(model(**step.inputs)) / step.loss_tokens).backward()


def test_a_model_called_twice_in_a_turn_is_refused(streaming):
    streaming, model, batch = streaming
    with pytest.raises(MemTuneError, match="more often"), streaming.step(batch) as step:
        for _ in step.turns():
            backward(step, model)
            backward(step, model)


def test_a_model_called_after_the_last_turn_is_refused(streaming):
    streaming, model, batch = streaming
    with pytest.raises(MemTuneError, match="more often"), streaming.step(batch) as step:
        for _ in step.turns():
            backward(step, model)
        model(**step.inputs)


@pytest.mark.parametrize("missed", [0, 1, 2])
def test_a_turn_in_which_the_model_was_not_called_is_refused(streaming, missed):
    streaming, model, batch = streaming
    with pytest.raises(MemTuneError, match="not called"), streaming.step(batch) as step:
        for number, _ in enumerate(step.turns()):
            if number != missed:
                backward(step, model)


@pytest.mark.parametrize("head", ["causal_lm", "sequence_classification"])
def test_a_turn_that_has_not_gone_backward_is_refused(head):
    """All losses at the end would be natural, and wrong."""
    model, batch, _ = model_and_batch("llama", head=head, lengths=LENGTHS)
    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=4))
    with pytest.raises(MemTuneError, match="not gone backward"), streaming.step(batch) as step:
        for _ in step.turns():
            model(**step.inputs, **({} if head == "causal_lm" else step.labels))
    streaming.remove()


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "modernbert"])
def test_bidirectional_models_are_refused_with_the_reason(name):
    model, _, _ = model_and_batch(name)
    before, names = traces(model), registered()
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*attends to later ones.*sequence_chunk_size"):
        Streaming(model, StreamingConfig(sequence_chunk_size=4))
    assert traces(model) == before and registered() == names


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
    for _ in range(2):
        take_turns(model, streaming, batch)
        assert traces(model) == before  # between steps
    streaming.remove()
    assert registered() == names and traces(model) == before == traces(untouched)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, untouched(**batch).logits)


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_a_step_that_fails_leaves_nothing_and_the_next_one_is_right(streaming, failing):
    """In the context pass, in the first turn's chunk, and in a later one: layer 1 runs once for each."""
    streaming, model, batch = streaming
    before = traces(model)
    calls = []

    def fail(module, args):
        calls.append(module)
        if len(calls) == failing + 1:
            raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        take_turns(model, streaming, batch)
    hook.remove()
    assert traces(model) == before
    assert worst_difference(take_turns(model, streaming, batch).gradients, plain_twin(model, batch)[1]) <= tolerance(torch.float64)


def test_a_removed_streaming_is_refused(streaming):
    streaming, _, batch = streaming
    streaming.remove()
    with pytest.raises(MemTuneError, match="removed"):
        streaming.step(batch)


def test_token_counts_are_of_real_tokens(streaming):
    streaming, model, batch = streaming
    assert take_turns(model, streaming, batch).step.token_counts()["seen"] == sum(LENGTHS) < batch["input_ids"].numel()
