"""Batches that something is wrong with: what plain training refuses is refused, with its own words where it has good ones."""

from contextlib import nullcontext

import pytest
import torch

from hf_memtune import MemTuneError, Streaming, StreamingConfig
from tests.support.stepping import model_and_batch, seeking_on

STREAM = {"sequence_chunk_size": 5}
METHODS = {
    "streaming": lambda model: Streaming(model, StreamingConfig(**STREAM)),
    "cut": seeking_on,
    "stream": lambda model: seeking_on(model, token_gradient="stream", **STREAM),
    "skip": lambda model: seeking_on(model, token_gradient="skip", **STREAM),
    "chosen at random": lambda model: seeking_on(model, token_scorer="random", token_selection="sample", token_ratio=0.1),
    "chosen in backward": lambda model: seeking_on(model, token_scorer="true_gradient"),
    "all kept": lambda model: seeking_on(model, token_ratio=1.0),
}


def step(model, batch, method=nullcontext):
    with method(model):
        loss = model(**batch).loss
        loss.backward()
    return loss.detach()


def plain_error(model, batch) -> Exception:
    with pytest.raises(Exception) as raised:
        step(model, batch)
    return raised.value


def assert_as_plain(model, batch, method):
    """The same error, in the same words, and nothing learned."""
    expected = plain_error(model, batch)
    with pytest.raises(type(expected)) as raised:
        step(model, batch, METHODS[method])
    assert str(raised.value) == str(expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", [-1, -5, 61])
def test_labels_that_are_no_class(label, method):
    """Also of a token that is not kept: whether it is, is a matter of chance."""
    for row, token in ((0, 4), (1, 2)):
        model, batch, _ = model_and_batch("llama")
        batch["labels"][row, token] = label
        assert_as_plain(model, batch, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [
    lambda labels: torch.cat([labels, labels[:, :2]], dim=1),
    lambda labels: labels[:, :-2],
    lambda labels: labels[:1],
    lambda labels: labels.repeat(2, 1),
    lambda labels: labels.float(),
], ids=["longer", "shorter", "fewer rows", "more rows", "no classes"])  # fmt: skip
def test_labels_of_another_shape(change, method):
    model, batch, _ = model_and_batch("llama")
    batch["labels"] = change(batch["labels"])
    assert_as_plain(model, batch, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_no_labels_at_all(name, method):
    """The mean over no token is not a number, and has no gradient; the next batch is learned."""
    if (name, method) == ("bart", "chosen in backward"):
        pytest.skip("no gradient comes to an encoder from outside")
    model, batch, _ = model_and_batch(name)
    if name == "bart":
        batch["decoder_input_ids"] = batch["labels"].clamp_min(1)
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert step(model, nothing).isnan() and step(model, nothing, METHODS[method]).isnan()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert step(model, batch, METHODS[method]).isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_tokens(method):
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(MemTuneError, match="row 0 of the batch has no tokens.*Leave out empty rows"):
        step(model, {name: value[:1, :0] for name, value in batch.items()}, METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, stack", [("llama", "decoder"), ("bart", "encoder")])
@pytest.mark.parametrize("tokens", [12, 26])
def test_a_mask_of_other_tokens_is_refused_before_anything_runs(tokens, name, stack, method):
    """Some models take one that is too long, and read the first of it."""
    model, batch, _ = model_and_batch(name)
    batch["attention_mask"] = batch["attention_mask"].repeat(1, 2)[:, :tokens]
    ran = []
    with METHODS[method](model):
        model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(MemTuneError, match=rf"mask is \(2, {tokens}\), expected \(2, 13\), the shape of the {stack}'s tokens"):
            model(**batch)
    assert not ran


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("attention_mask", (3, 13), r"attention_mask is \(3, 13\), expected \(2, 13\)"),
        ("position_ids", (2, 9), r"position_ids are \(2, 9\), expected \(2, 13\)"),
        ("position_ids", (3, 13), r"position_ids are \(3, 13\), expected \(2, 13\)"),
    ],
)
def test_masks_and_positions_of_other_rows_are_refused_before_anything_runs(name, shape, message, method):
    model, batch, _ = model_and_batch("llama")
    batch[name] = torch.ones(shape, dtype=torch.long)
    ran = []
    with METHODS[method](model):
        model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(MemTuneError, match=message):
            model(**batch)
    assert not ran


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_rows(method):
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(MemTuneError, match="the batch has no rows"):
        step(model, {name: value[:0] for name, value in batch.items()}, METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [-1, 10_000])
def test_ids_out_of_range_fail_as_in_plain_training(number, method):
    model, batch, _ = model_and_batch("llama")
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][1, 3] = number
    assert_as_plain(model, batch, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_right_is_learned(method):
    """The sibling of all of the above."""
    model, batch, _ = model_and_batch("llama")
    assert step(model, batch, METHODS[method]).isfinite()
    assert any(parameter.grad.any() for parameter in model.parameters())
