"""What one call and its backward take under a method, byte by byte: what grows with the rows, and sums that are never held twice."""

import pytest
import torch

from hf_memtune import LiveBytes, Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from hf_memtune.core import pieces
from hf_memtune.memory import StepLedger
from hf_memtune.methods.attention.outputs import BodyOutputs
from tests.support.tiny_models import batch_for, tiny_model

ROWS, CHUNK, KEPT, LAYERS, WIDTH, HEADS, CHANNELS = 2, 8, 8, 3, 32, 4, 8
SHORT, LONG = 64, 128  # tokens of a row
# What a token more in every row adds, in float32.
OF_ONE_LAYER = ROWS * 2 * HEADS * CHANNELS * 4  # keys and values
STORED = LAYERS * OF_ONE_LAYER
OWED = STORED  # sums of gradients
HIDDEN = ROWS * WIDTH * 4  # last hidden states, or their gradient
POSITION = 8
MASK = 4  # of one query

VOCABULARY = 4096
MATRIX = VOCABULARY * WIDTH * 4
LARGEST = 48 * WIDTH * 4  # of the matrices of a layer


def llama(**sizes):
    return tiny_model("llama", dtype=torch.float32, num_key_value_heads=HEADS, max_position_embeddings=2 * LONG, **sizes)


def streaming(model, tokens):
    return Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK))


def seeking(model, tokens):
    """Keeps as many tokens of a row, however long it is."""
    settings = {"token_ratio": KEPT / tokens, "token_scorer": "random", "token_selection": "top", "always_keep": "none"}
    return TokenSeeking(model, TokenSeekingConfig(token_seeking=True, context_chunk_size=16, **settings))


def plain(model, tokens):
    return torch.enable_grad()


def peak(method, tokens, holds_outputs=False):
    """Live bytes of one call and its backward that were not there before; gradients were."""
    model = llama()
    batch = batch_for(model, lengths=(tokens,) * ROWS)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with method(model, tokens), LiveBytes() as live:
        outputs = model(**batch, use_cache=False)
        loss = outputs.loss
        if not holds_outputs:
            del outputs
        loss.backward()
    return live.peak_bytes


def growth(method, **options):
    """Of the peak, for each token that a row is longer."""
    return (peak(method, LONG, **options) - peak(method, SHORT, **options)) / (LONG - SHORT)


# -- what grows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holds_outputs", [True, False])
def test_of_a_stream_keys_values_their_sums_hidden_states_and_a_gradient_grow(monkeypatch, holds_outputs):
    """Nothing else: what a chunk finds for earlier keys and values is as long as a block; in rows shorter than one it grows as well."""
    expected = STORED + OWED + HIDDEN * (1 + holds_outputs) + POSITION
    assert growth(streaming, holds_outputs=holds_outputs) == expected + OF_ONE_LAYER
    monkeypatch.setattr(pieces, "BLOCK", 16)
    assert growth(streaming, holds_outputs=holds_outputs) == expected


def test_hidden_states_that_are_kept_for_no_one_are_seen(monkeypatch):
    """The sibling: a stream that does not let go of its outputs needs them twice over what it should."""
    clean = growth(streaming)
    monkeypatch.setattr(BodyOutputs, "take", lambda self: self.as_returned(self.tensors))
    assert growth(streaming) == clean + HIDDEN


def test_of_kept_tokens_alone_keys_and_values_grow():
    """The stored ones; of the layer that goes backward a copy with the live ones in it, and their gradients."""
    assert growth(seeking) == STORED + 2 * OF_ONE_LAYER + ROWS * KEPT * MASK + POSITION


def test_in_plain_training_everything_grows():
    """The sibling: the same count, of all activations of all tokens."""
    assert growth(plain) > 3 * growth(streaming) > 3 * growth(seeking)


def test_the_loss_needs_less_than_what_comes_after_it(monkeypatch):
    """It makes the gradient of the hidden states, and copies none of them; but nothing is owed yet, and logits are a few at a time."""
    monkeypatch.setattr("hf_memtune.core.loss.LOGIT_CHUNK_BYTES", 0)
    grown = []
    for tokens in (SHORT, LONG):
        model = llama()
        batch = batch_for(model, lengths=(tokens,) * ROWS)
        with streaming(model, tokens), StepLedger(model) as ledger:
            model(**batch, use_cache=False).loss.backward()
        grown.append(ledger.account().phase("forward").peak_bytes)
    of_labels_and_losses = ROWS * 64
    assert 0 <= (grown[1] - grown[0]) / (LONG - SHORT) - STORED - 2 * HIDDEN < of_labels_and_losses


# -- sums ------------------------------------------------------------------------------------------------------------------


def of_parameters(model, ledger, when_chunks_go_back=False):
    """The most bytes at a time of tensors that a step has made, and that have the shape of a parameter.

    when_chunks_go_back: from when the first of them has found the gradient of an MLP's matrix.
    """
    shapes, live, most, counts = {tuple(parameter.shape) for parameter in model.parameters()}, 0, 0, not when_chunks_go_back
    for record, sign, phase in ledger.log.events:
        if record is None or record.phase is None or tuple(record.shape) not in shapes:
            continue
        live += sign * record.counted_bytes
        counts = counts or (phase == "backward" and tuple(record.shape) == (48, WIDTH))
        most = max(most, live) if counts else most
    return most


def step(micro_batch, tied, hooked=False):
    """(model, ledger) of the first or a later micro-batch of a step, all parameters trained."""
    model = llama(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    batch = batch_for(model, lengths=(SHORT,) * ROWS)
    for parameter in model.parameters() if hooked else ():
        parameter.register_hook(lambda gradient: None)
    with streaming(model, SHORT):
        for _ in range(micro_batch):
            with StepLedger(model) as ledger:
                model(**batch, use_cache=False).loss.backward()
    return model, ledger


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_are_there_are_added_to(tied):
    """All that a second micro-batch makes of that size is the gradient of the head, with the loss; it is gone when chunks go back."""
    model, ledger = step(2, tied)
    assert of_parameters(model, ledger) == MATRIX
    assert of_parameters(model, ledger, when_chunks_go_back=True) == LARGEST


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_gradients_are_made_once(tied):
    """One of each parameter, and one that a chunk adds."""
    model, ledger = step(1, tied)
    assert 0 <= of_parameters(model, ledger) - sum(p.nbytes for p in model.parameters()) <= LARGEST


@pytest.mark.parametrize("tied", [False, True])
def test_sums_beside_gradients_are_seen(tied):
    """The sibling: a hook that is to see each gradient before it is added needs it whole, beside the one that is there."""
    model, ledger = step(2, tied, hooked=True)
    of_body = sum(p.nbytes for p in model.model.parameters())
    assert of_parameters(model, ledger, when_chunks_go_back=True) >= of_body
