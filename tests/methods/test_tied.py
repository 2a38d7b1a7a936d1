"""A matrix that is both embedding and head: one gradient buffer, whatever the model does around its embedding."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from hf_memtune import StreamingConfig, TokenSeekingConfig
from hf_memtune.memory.shapes import SHAPES
from hf_memtune.methods import tied
from hf_memtune.methods.streaming import chunk_stream, embedding
from hf_memtune.units import MIB
from tests.support.causal_lm_step import trace_causal_lm_step
from tests.support.stepping import plain_twin, stream, take_step, token_twin
from tests.support.tiny_models import batch_for, lm_head, tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference

TIED = ["llama", "gemma3", "gpt2", "opt", "bert"]  # gemma3 scales its embeddings, bert has a bias and types, opt positions


@pytest.fixture
def links(monkeypatch):
    """The number of links that token seeking made between an embedding and a head."""
    made = []
    embed = tied.embed_tied
    monkeypatch.setattr(tied, "embed_tied", lambda *args: made.append(args) or embed(*args))
    return made


@pytest.fixture
def lookups(monkeypatch):
    """The number of lookups of chunks, whose gradients were added to the one matrix row by row."""
    made = []
    embed = embedding.embed_summed
    monkeypatch.setattr(embedding, "embed_summed", lambda *args: made.append(args) or embed(*args))
    return made


def tied_model(name, **overrides):
    model = tiny_model(name, tie_word_embeddings=True, **overrides)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return model


def allowed(name) -> float:
    return FLOAT32_INSIDE if name == "gemma3" else RELATIVE[torch.float64]


@pytest.mark.parametrize("name", TIED)
def test_token_seeking_has_the_gradients_of_its_twin(name, links):
    model = tied_model(name)
    batch = batch_for(model, lm_head(name))
    taken = take_step(model, batch)
    assert len(links) == 1
    _, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert worst_difference(taken.gradients, expected) <= allowed(name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", [name for name in TIED if name != "bert"])
def test_streaming_has_the_gradients_of_plain_training(name, smoothing, lookups):
    model = tied_model(name)
    batch = batch_for(model)
    streamed = stream(model, batch, 4, label_smoothing=smoothing)
    assert streamed.heard.chunks == [4] and len(lookups) == 4
    _, expected = plain_twin(model, batch, label_smoothing=smoothing)
    assert worst_difference(streamed.gradients, expected) <= allowed(name)


def test_an_embedding_without_its_gradient_would_be_noticed(monkeypatch):
    """The sibling: what the link must not lose is large."""
    model = tied_model("llama")
    batch = batch_for(model)
    monkeypatch.setattr("hf_memtune.core.tied.add_rows", lambda *args: None)
    _, expected = plain_twin(model, batch)
    assert worst_difference(stream(model, batch, 4).gradients, expected) > NOTICED


def test_padding_has_no_gradient_where_the_model_says_so():
    model = tied_model("llama")
    model.model.embed_tokens.padding_idx = 7  # a token that is in the batch
    batch = batch_for(model)
    batch["input_ids"][0, :3] = 7
    _, expected = plain_twin(model, batch)
    assert worst_difference(stream(model, batch, 4).gradients, expected) <= RELATIVE[torch.float64]


@pytest.mark.parametrize("chunk", [4, 32])
def test_a_model_that_embeds_twice_has_both_gradients(chunk):
    model = tied_model("llama")
    batch, embedding = batch_for(model), model.model.embed_tokens

    class Twice(nn.Module):
        weight = embedding.weight

        def forward(self, ids):
            return embedding(ids) + 0.5 * embedding(ids.flip(0))

    model.model.embed_tokens = twice = Twice()
    taken = stream(model, batch, chunk)
    _, expected = plain_twin(model, batch)
    assert worst_difference(taken.gradients, expected) <= RELATIVE[torch.float64]
    assert "forward" not in vars(twice)


def freeze(model):
    model.get_input_embeddings().weight.requires_grad_(False)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def limit_norm(model):
    model.get_input_embeddings().max_norm = 1e6


@pytest.mark.parametrize("change", [freeze, untie, limit_norm])
def test_what_is_not_one_trained_matrix_is_left_alone(change, links):
    model = tied_model("llama")
    change(model)
    batch = batch_for(model)
    streamed, sought = stream(model, batch, 4), take_step(model, batch)
    assert not links
    _, expected = plain_twin(model, batch)
    assert worst_difference(streamed.gradients, expected) <= RELATIVE[torch.float64]
    _, expected = token_twin(model, batch, sought.kept, "causal_lm")
    assert worst_difference(sought.gradients, expected) <= RELATIVE[torch.float64]


def test_embeddings_that_the_batch_brings_need_no_link(lookups):
    model = tied_model("llama")
    batch = batch_for(model)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    streamed = stream(model, batch, 4)
    assert not lookups
    _, expected = plain_twin(model, batch)
    assert worst_difference(streamed.gradients, expected) <= RELATIVE[torch.float64]


def test_autocast_casts_the_matrix_once():
    """It keeps casts of parameters alone, and what the head is given is none."""
    model = tied_model("llama", dtype=torch.float32)
    batch = batch_for(model, lengths=(60, 60))
    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == model.lm_head.weight.shape:
                casts.append((kwargs or {}).get("dtype"))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), Casts():
        patch.setattr("hf_memtune.core.loss.logit_rows", lambda classes: 16)
        streamed = stream(model, batch, 32)
    assert streamed.heard.chunks == [2] and casts == [torch.bfloat16]


@pytest.mark.parametrize(
    "strategy",
    [TokenSeekingConfig(token_seeking=True, token_ratio=0.1), StreamingConfig(sequence_chunk_size=512)],
    ids=["seeking", "streaming"],
)
def test_a_large_vocabulary_costs_one_matrix_where_it_cost_three(strategy, monkeypatch):
    """Bytes above weights and gradients, every parameter trained. The sibling: without the link."""
    config = SHAPES["Qwen2.5-0.5B"]()
    config.num_hidden_layers = 2
    matrix = config.vocab_size * config.hidden_size * 2

    def peak():
        return trace_causal_lm_step(config, 2048, lora_rank=None, checkpointing=True, strategy=strategy).peak_bytes

    assert matrix < peak() < matrix + 130 * MIB  # logits of a chunk in two precisions are 46 MiB, the residuals of several 64
    monkeypatch.setattr("hf_memtune.methods.seeking.ditched.tied_matrix", _unlinked)
    monkeypatch.setattr(chunk_stream, "_tied_matrix", lambda *args: None)
    monkeypatch.setattr(chunk_stream, "rows_summed_in_place", lambda embedding: nullcontext())
    assert peak() >= (3 if isinstance(strategy, TokenSeekingConfig) else 2) * matrix  # the sum of chunks takes the gradient that is there


@contextmanager
def _unlinked(architecture):
    yield None
