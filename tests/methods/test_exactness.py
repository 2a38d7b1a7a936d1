"""Token ditching is a theorem about gradients, not an approximation of one: every parameter's gradient equals that of a full
forward in which hidden states, keys and values of the other tokens are detached."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_memtune.architectures import Task
from tests.methods.stepping import (
    Taken,
    assert_equal_step,
    has_float32_inside,
    model_and_batch,
    seeking_on,
    take_step,
    token_twin,
)
from tests.methods.tiny_models import CAUSAL, FURTHER, MASKED, lm_head
from tests.methods.twin import gradients, worst_difference
from tests.tolerances import NOTICED, tolerance

EVERY = [*CAUSAL, *MASKED, "bart"]
# Summed attention favours the first tokens so much that a causal row would keep a prefix of itself, on which cutting the rest
# changes nothing. The mean over the rows that see a token, and a heavier gradient score, spread the choice.
SPREAD = {"context_normalize": "mean", "gradient_weight": 4.0}


def _is_prefix(kept, batch):
    """Whether every row keeps nothing but its first real tokens, where causal attention meets no ditched one."""
    real = batch["attention_mask"].bool() if batch["attention_mask"].shape == kept.shape else torch.ones_like(kept)
    number = real.cumsum(1)
    return bool((kept == (real & (number <= kept.sum(1, keepdim=True)))).all())


@pytest.mark.parametrize("scorer", ["combined", "random"])
@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_equals_the_twin(name, side, chunk, scorer):
    model, batch, dtype = model_and_batch(name, side)
    taken = take_step(model, batch, token_scorer=scorer, context_chunk_size=chunk, **SPREAD)
    assert len(set(taken.selection["decoder"].counts)) > 1  # rows of different lengths, or the fillers go untested
    assert not _is_prefix(taken.kept["decoder"], batch)  # before the first ditched token there is nothing to get wrong
    loss, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside(name))


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FURTHER)
def test_further_architectures_equal_the_twin(name, side, chunk):
    model, batch, dtype = model_and_batch(name, side)
    taken = take_step(model, batch, context_chunk_size=chunk, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside(name))


@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_equals_the_twin_with_eager_attention(name):
    model, batch, dtype = model_and_batch(name, _attn_implementation="eager")
    if "sliding" in name or name == "gemma3":  # eager, float64 and rows that see nothing: NaN in transformers itself
        model, batch, dtype = model_and_batch(name, _attn_implementation="eager", sliding_window=8)
    taken = take_step(model, batch, context_chunk_size=4, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert_equal_step(taken, loss, expected, dtype, float32_inside=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "bart"])
def test_logits_of_the_model_itself_give_the_same_gradients(name):
    """`whole_logits` leaves the head alone, for loss functions of one's own: the same numbers without the fused loss."""
    model, batch, dtype = model_and_batch(name)
    taken = take_step(model, batch, **SPREAD)
    own = take_step_with_own_loss(model, batch)
    assert_equal_step(own, taken.loss, taken.gradients, dtype, has_float32_inside(name))


def take_step_with_own_loss(model, batch):
    seeking = seeking_on(model, **SPREAD)
    with seeking.step(batch, whole_logits=True) as step:
        outputs = model(**step.inputs)
    logits, labels = outputs.logits, step.shiftable_labels()
    if seeking.architecture.task is Task.CAUSAL_LM:  # shift as every causal loss of transformers does
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    seeking.remove()
    return Taken(loss.detach(), gradients(model, loss), step.selection, step.fused, outputs)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_all_tokens_kept_is_plain_training(name, side):
    """Against the untouched model: its own loss, which transformers takes in float32, and its logits in float64."""
    model, batch, dtype = model_and_batch(name, side)
    if side == "left" and lm_head(name) == "causal_lm":
        batch["labels"] = _without_prediction_from_padding(batch)
    own = model(**batch).loss
    own_gradients = gradients(model, own)
    exact = _loss_of_plain_logits(model, batch, name)
    taken = take_step(model, batch, token_ratio=1.0, context_chunk_size=4)
    assert_equal_step(taken, own.detach(), own_gradients, dtype, float32_inside=True)
    assert_equal_step(taken, exact.detach(), gradients(model, exact), dtype, has_float32_inside(name))


def _without_prediction_from_padding(batch):
    """With left padding, plain training also predicts a row's first token from the padding before it: padding is never kept."""
    first = batch["attention_mask"].cumsum(1) == 1
    return batch["labels"].masked_fill(first, -100)


def _loss_of_plain_logits(model, batch, name):
    logits, labels = model(**batch).logits, batch["labels"]
    if lm_head(name) == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_bfloat16_is_as_near_to_float64_as_the_twin_in_bfloat16():
    model, batch, dtype = model_and_batch("llama", dtype=torch.bfloat16)
    reference = copy.deepcopy(model).double()
    taken = take_step(model, batch, **SPREAD)
    _, in_bfloat16 = token_twin(model, batch, taken.kept, "causal_lm")
    loss, expected = token_twin(reference, batch, taken.kept, "causal_lm")
    ours, twins = _error(taken.gradients, expected), _error(in_bfloat16, expected)
    assert abs(taken.loss - loss) <= tolerance(dtype) * loss
    assert ours <= tolerance(dtype)
    assert ours <= 1.5 * twins


def _error(found, expected):
    """Relative error of the gradient as one vector: single parameters may be all rounding."""
    distance = sum((found[name].double() - g).square().sum() for name, g in expected.items())
    return float((distance / sum(g.square().sum() for g in expected.values())).sqrt())


# -- siblings: what the comparisons above must notice ----------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_kept_mask_is_noticed(name):
    model, batch, _ = model_and_batch(name)
    taken = take_step(model, batch, **SPREAD)
    wrong = {stack: mask.roll(1, 1) & taken_real(batch, mask) for stack, mask in taken.kept.items()}
    _, expected = token_twin(model, batch, wrong, lm_head(name))
    assert worst_difference(taken.gradients, expected) > NOTICED


def taken_real(batch, mask):
    """Padding is never kept, in the wrong twin either."""
    real = batch["attention_mask"] if batch["attention_mask"].shape == mask.shape else batch["labels"] != -100
    return real.bool()


@pytest.mark.parametrize("name", EVERY)
def test_a_twin_without_detaching_is_noticed(name):
    """The same loss tokens, the gradient through all: ditching changes the gradient, and the comparison sees it."""
    model, batch, _ = model_and_batch(name)
    taken = take_step(model, batch, **SPREAD)
    everything = {stack: torch.ones_like(mask) for stack, mask in taken.kept.items()}
    target = batch["labels"].masked_fill(~_labels_kept(taken.kept["decoder"], name), -100)
    loss, expected = token_twin(model, batch | {"labels": target}, everything, lm_head(name))
    if name != "bart":  # there the labels are the decoder's input as well
        assert abs(taken.loss - loss) < 1e-6
    assert worst_difference(taken.gradients, expected) > NOTICED


def _labels_kept(kept, name):
    return kept.roll(1, 1) if lm_head(name) == "causal_lm" else kept


def test_a_loss_over_other_tokens_is_noticed():
    model, batch, _ = model_and_batch("llama")
    taken = take_step(model, batch, token_ratio=0.6)
    assert worst_difference(taken.gradients, gradients(model, model(**batch).loss)) > NOTICED
