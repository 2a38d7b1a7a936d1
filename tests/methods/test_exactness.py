"""Token ditching is a theorem about gradients, not an approximation of one: every parameter's gradient equals that of a full
forward in which hidden states, keys and values of the other tokens are detached."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_memtune.core.sampling import CERTAIN, systematic
from tests.support.stepping import (
    Ear,
    assert_equal_step,
    has_float32_inside,
    loss_of,
    model_and_batch,
    seeking_on,
    take_step,
    target_of,
    token_twin,
)
from tests.support.tiny_models import CAUSAL, FURTHER, MASKED, lm_head
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import ditching, gradients, worst_difference

FLOAT32_ROUTERS = ("deepseek-v3", "afmoe")
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
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside(name) or name in FLOAT32_ROUTERS)


@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_equals_the_twin_with_eager_attention(name):
    model, batch, dtype = model_and_batch(name, _attn_implementation="eager")
    if "sliding" in name or name == "gemma3":  # eager, float64 and rows that see nothing: NaN in transformers itself
        model, batch, dtype = model_and_batch(name, _attn_implementation="eager", sliding_window=8)
    taken = take_step(model, batch, context_chunk_size=4, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert_equal_step(taken, loss, expected, dtype, float32_inside=True)


def own_loss(model, batch, with_labels=False):
    """The mean loss of all labels, from logits that are made: for all tokens, as any loss of one's own has them."""
    inputs = {name: value for name, value in batch.items() if with_labels or name != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    target = target_of(model, batch)
    labelled = target != -100
    found = model(**inputs).logits.log_softmax(-1).gather(-1, target.clamp_min(0)[..., None])[..., 0]
    return -(found * labelled).sum() / labelled.sum()


def chosen_in_backward(model, batch, with_labels=False, **settings):
    """The loss, the gradients, and the kept tokens of a loss that is not the method's own."""
    ear = Ear()
    with seeking_on(model, **SPREAD, **settings) as seeking:
        seeking.listeners.add(ear)
        loss = own_loss(model, batch, with_labels)
        assert len(ear.selections) == with_labels  # for the model's own loss, which nobody uses
        found = gradients(model, loss)
    return loss.detach(), found, ear


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("scorer", ["combined", "random", "true_gradient"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "bart"])
def test_a_loss_of_ones_own_is_that_of_all_tokens_and_its_gradient_that_of_the_twin(name, scorer, chunk):
    """Tokens are chosen when backward comes: the body learns from the kept ones, the head, which has seen all, from all."""
    if (name, scorer) == ("bart", "true_gradient"):
        pytest.skip("no gradient comes to an encoder from outside")
    model, batch, dtype = model_and_batch(name)
    plain = own_loss(model, batch).detach()
    loss, found, ear = chosen_in_backward(model, batch, token_scorer=scorer, context_chunk_size=chunk)
    with ditching(model, {stack: chosen.kept_mask() for stack, chosen in ear.selections[0].items()}):
        twin = own_loss(model, batch)
    allowed = tolerance(dtype, has_float32_inside(name))
    assert abs(loss - plain) <= allowed * plain
    assert worst_difference(found, gradients(model, twin)) <= allowed


@pytest.mark.parametrize("settings", [{}, {"token_selection": "sample"}], ids=str)
@pytest.mark.parametrize("kind", [{}, {"token_gradient": "stream", "sequence_chunk_size": 4}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_labels_that_a_loss_of_ones_own_has_no_use_for_change_nothing(name, kind, settings):
    """The model has taken its own loss of them, for tokens that were chosen for that; nobody goes backward from it."""
    if name == "bert" and kind:
        pytest.skip("not causal")
    scores = {} if name != "bart" or not kind else {"token_scorer": "context"}
    model, batch, dtype = model_and_batch(name)
    torch.manual_seed(2)
    for _ in range((2 if name == "bart" and not kind else 1) if settings else 0):
        systematic(torch.full((2, 1), CERTAIN))  # the draw of a stack that is not used
    _, expected, without = chosen_in_backward(model, batch, **kind, **settings, **scores)
    torch.manual_seed(2)
    _, found, beside = chosen_in_backward(model, batch, True, **kind, **settings, **scores)
    assert torch.equal(beside.selections[-1]["decoder"].kept_mask(), without.selections[0]["decoder"].kept_mask())
    assert worst_difference(found, expected) <= tolerance(dtype)
    assert beside.counts["kept"] == without.counts["kept"]  # each token is told of once
    if settings:
        assert not torch.equal(*(each["decoder"].kept_mask() for each in beside.selections))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_a_loss_of_ones_own_chooses_the_tokens_that_the_models_loss_chooses(name):
    """Labels are told by the gradient that comes from them, and it scores as the gradient of the labels does."""
    model, batch, _ = model_and_batch(name)
    _, _, ear = chosen_in_backward(model, batch)
    assert torch.equal(ear.selections[0]["decoder"].kept_mask(), take_step(model, batch, **SPREAD).kept["decoder"])


@pytest.mark.parametrize("ratio", [1.0, 0.999])  # the model's own way; all tokens, but through the method, since budgets are rounded up
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_all_tokens_kept_is_plain_training(name, side, ratio):
    """Against the untouched model: its own loss, which transformers takes in float32, and its logits in float64."""
    model, batch, dtype = model_and_batch(name, side)
    if ratio < 1 and side == "left" and lm_head(name) == "causal_lm":
        batch["labels"] = _without_prediction_from_padding(batch)
    own = model(**batch).loss
    own_gradients = gradients(model, own)
    exact = _loss_of_plain_logits(model, batch, name)
    taken = take_step(model, batch, token_ratio=ratio, context_chunk_size=4)
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


# -- all tokens of rows that are far from equally long, with labels at places that plain training learns from too ----------


def uneven(labels):
    """Rows of 5 and 40 tokens. labels: which tokens have one."""
    model, batch, dtype = model_and_batch("llama", lengths=(5, 40))
    if labels == "padding":
        batch["labels"] = torch.where(batch["attention_mask"] == 0, 7, batch["labels"])
    if labels == "answers":
        batch["labels"][0, :3], batch["labels"][1, :22] = -100, -100
    return model, batch, dtype


def plain_step(model, batch, take):
    loss = take(model, batch)
    return loss.detach(), gradients(model, loss)


LOSSES = {
    "own": lambda model, batch: model(**batch).loss,
    "of logits": lambda model, batch: own_loss(model, batch),
    "fused": lambda model, batch: loss_of(model, batch)[0],
}
GRADIENTS = {
    "cut": {},
    "stream": {"token_gradient": "stream", "sequence_chunk_size": 16},
    "skip": {"token_gradient": "skip", "skip_threshold": 0.0, "sequence_chunk_size": 16},
}


@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("token_gradient", GRADIENTS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", ["all", "answers", "padding"])
def test_a_ratio_of_1_is_plain_training(labels, loss, token_gradient, selection):
    model, batch, dtype = uneven(labels)
    expected, wanted = plain_step(model, batch, LOSSES[loss])
    with seeking_on(model, token_ratio=1.0, token_selection=selection, **GRADIENTS[token_gradient]):
        found, gradient = plain_step(model, batch, LOSSES[loss])
    allowed = tolerance(torch.float32 if loss == "own" else dtype)  # transformers takes its loss in float32
    assert abs(found - expected) <= allowed * expected
    assert worst_difference(gradient, wanted) <= allowed


@pytest.mark.parametrize("token_gradient", GRADIENTS)
def test_a_ratio_below_1_is_noticed(token_gradient):
    model, batch, _ = uneven("padding")
    _, wanted = plain_step(model, batch, LOSSES["fused"])
    with seeking_on(model, token_ratio=0.8, **GRADIENTS[token_gradient]):
        _, gradient = plain_step(model, batch, LOSSES["fused"])
    assert worst_difference(gradient, wanted) > NOTICED


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
