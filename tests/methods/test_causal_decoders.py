"""Decoders of encoder-decoder models as causal models: they number tokens by themselves, ask for masks of an encoder that they have not
got, and most do not shift labels. Their own loss is learned as it is."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core.logits import LazyLogits
from tests.support.stepping import model_and_batch, seeking_on
from tests.support.tiny_models import _BART_LIKE, VOCABULARY
from tests.support.tolerances import NOTICED, close, tolerance
from tests.support.twin import gradients, worst_difference

_DECODER = {**_BART_LIKE, "is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 1}
_WHISPER = {name: value for name, value in _DECODER.items() if name != "max_position_embeddings"}
_WHISPER |= {"max_target_positions": 64, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}
MODELS = {
    "bart": lambda: tf.BartForCausalLM(tf.BartConfig(**_DECODER)),
    "mbart": lambda: tf.MBartForCausalLM(tf.MBartConfig(**_DECODER)),
    "marian": lambda: tf.MarianForCausalLM(tf.MarianConfig(**_DECODER, decoder_start_token_id=1)),
    "pegasus": lambda: tf.PegasusForCausalLM(tf.PegasusConfig(**_DECODER)),
    "whisper": lambda: tf.WhisperForCausalLM(tf.WhisperConfig(**_WHISPER)),
}


def decoder(name, side="right", masked=True):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids, mask = torch.randint(5, VOCABULARY, (2, 13)), torch.ones(2, 13, dtype=torch.long)
    if not masked:
        return model, {"input_ids": ids, "labels": ids.roll(-1, 1)}
    mask[1, slice(9, None) if side == "right" else slice(0, 4)] = 0
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.roll(-1, 1).masked_fill(mask == 0, -100)}


def own_step(model, batch):
    outputs = model(**batch)
    return outputs.loss.detach(), gradients(model, outputs.loss), outputs.logits


def shifted_loss(model, batch):
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("masked, side", [(True, "right"), (True, "left"), (False, "right")])
@pytest.mark.parametrize("name", MODELS)
def test_a_stream_learns_their_own_loss(name, masked, side):
    model, batch = decoder(name, side, masked)
    loss, expected, _ = own_step(model, batch)
    with Streaming(model, StreamingConfig(sequence_chunk_size=5)):
        found_loss, found, logits = own_step(model, batch)
    assert isinstance(logits, LazyLogits) and logits._memory.values is None
    assert abs(found_loss - loss) <= tolerance(torch.float64) * loss  # these take it in the dtype of the logits
    assert worst_difference(found, expected) <= tolerance(torch.float64)
    assert worst_difference(found, gradients(model, shifted_loss(model, batch))) > NOTICED


@pytest.mark.parametrize(
    "settings", [{"token_ratio": 0.999}, {"token_ratio": 1.0, "token_gradient": "stream", "sequence_chunk_size": 5}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_token_seeking_that_keeps_all_learns_their_own_loss(name, settings):
    model, batch = decoder(name)
    loss, expected, _ = own_step(model, batch)
    with seeking_on(model, **settings):
        found_loss, found, _ = own_step(model, batch)
    assert abs(found_loss - loss) <= tolerance(torch.float64) * loss
    assert worst_difference(found, expected) <= tolerance(torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_looked_at_are_the_labels_that_are_learned(name):
    model, batch = decoder(name)
    with seeking_on(model, token_scorer="loss") as seeking:
        seen = seeking.inspect(batch, ("token_loss",))
    assert torch.equal(seen.target, batch["labels"])
    logits = model(**batch).logits.detach()
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    torch.testing.assert_close(seen.scores["decoder"]["token_loss"], expected.float(), **close(torch.float32))


@pytest.mark.parametrize("name", ["bart", "marian", "bart with its encoder"])
def test_attention_is_scored_by_the_rule_of_the_decoder_where_no_mask_is_made(name):
    """Of a decoder that sees its own past, and all of its encoder, both are None: eager attention has a mask for each."""
    received = []
    for attention in ("sdpa", "eager"):
        model, batch = decoder(name, masked=False) if name in MODELS else model_and_batch("bart", lengths=(13, 13))[:2]
        batch.pop("attention_mask", None)
        model.float().set_attn_implementation(attention)
        with seeking_on(model) as seeking:
            received.append(seeking.inspect(batch, ("context_score",)).scores["decoder"]["context_score"])
    torch.testing.assert_close(*received, **close(torch.float32))
    assert (received[0][:, 0] > 2 * received[0][:, -1]).all()  # the first is seen by all, the last by itself
