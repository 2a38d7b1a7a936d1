"""Every head: a loss at each token, taken at the kept ones; or one loss for a row, over kept tokens and constants."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import PROBLEMS, classified
from tests.support.stepping import Ear, assert_equal_step, model_and_batch, seeking_on, take_step, token_twin
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import ditching, gradients, worst_difference

SPREAD = {"context_normalize": "mean", "gradient_weight": 4.0}
SEQUENCE = [
    ("llama", "right"),
    ("llama", "left"),
    ("gpt2", "left"),
    ("opt", "right"),
    ("bert", "right"),
    ("roberta", "right"),
    ("distilbert", "right"),
]
QUESTION = [("llama", "right"), ("llama", "left"), ("bert", "right"), ("roberta", "right"), ("distilbert", "right")]
TOKEN = [("llama", "right"), ("llama", "left"), ("gpt2", "right"), ("bert", "right"), ("roberta", "left"), ("distilbert", "right")]


def pooled_twin(model, batch, kept):
    """The model's own loss of a full forward in which everything of unselected tokens is detached."""
    with ditching(model, kept):
        loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name, side", SEQUENCE)
def test_sequence_classification_equals_the_twin(name, side, problem):
    model, batch, dtype = classified(name, side, problem)
    taken = take_step(model, batch, **SPREAD)
    loss, expected = pooled_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


@pytest.mark.parametrize("name, side", QUESTION)
def test_question_answering_equals_the_twin(name, side):
    model, batch, dtype = model_and_batch(name, side, "question_answering")
    taken = take_step(model, batch, **SPREAD)
    loss, expected = pooled_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


@pytest.mark.parametrize("scorer", ["combined", "loss", "random"])
@pytest.mark.parametrize("name, side", TOKEN)
def test_token_classification_equals_the_twin(name, side, scorer):
    model, batch, dtype = model_and_batch(name, side, "token_classification")
    taken = take_step(model, batch, token_scorer=scorer, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


@pytest.mark.parametrize(
    "head, name",
    [
        ("sequence_classification", "llama"),
        ("sequence_classification", "bert"),
        ("question_answering", "bert"),
        ("question_answering", "llama"),
        ("token_classification", "bert"),
        ("token_classification", "llama"),
    ],
)
@pytest.mark.parametrize("ratio", [1.0, 0.999])  # the model's own way; all tokens, but through the method
def test_all_tokens_kept_is_plain_training(head, name, ratio):
    # rows of one length: plain training also learns from padding, whose logits stand in the softmax over positions
    model, batch, dtype = model_and_batch(name, head=head, lengths=(13, 13 if ratio < 1 else 9))
    loss = model(**batch).loss
    expected = gradients(model, loss)
    taken = take_step(model, batch, token_ratio=ratio)
    # transformers takes the losses of its token classifiers and question heads in the dtype of the logits
    assert_equal_step(taken, loss.detach(), expected, dtype, float32_inside=True)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_dropout_before_a_classifier_of_tokens_is_not_left_out(name):
    """The probe of the model runs without dropout, and sees the head read what the body returns: not so in training."""
    model, batch, dtype = model_and_batch(name, head="token_classification")
    model.dropout = EveryThird()
    taken = take_step(model, batch, **SPREAD)
    assert_equal_step(taken, *token_twin(model, batch, taken.kept), dtype)
    model.dropout = torch.nn.Identity()
    assert worst_difference(taken.gradients, token_twin(model, batch, taken.kept)[1]) > NOTICED


class EveryThird(torch.nn.Module):
    """Dropout without chance."""

    def forward(self, hidden):
        return hidden * (torch.arange(hidden.shape[-1]) % 3 > 0) * 1.5 if self.training else hidden


# -- what a pooled head cannot do without ----------------------------------------------------------------------------


def worst_at(positions):
    """A scorer that would choose every other token first."""

    def scorer(seen):
        return torch.ones(seen.attention_mask.shape).scatter(1, positions, -1.0)

    return scorer


@pytest.mark.parametrize("name, side", SEQUENCE)
def test_the_pooled_position_is_kept_whatever_its_score(name, side):
    model, batch, dtype = classified(name, side)
    mask = batch["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(1, keepdim=True)
    pooled = torch.zeros_like(last) if name in ("bert", "roberta", "distilbert") else last
    taken = take_step(model, batch, scorer=worst_at(pooled))
    assert taken.kept["decoder"].gather(1, pooled).all()
    assert taken.selection["decoder"].counts == (5, 4)  # out of the budget, not on top of it
    loss, expected = pooled_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


@pytest.mark.parametrize("pool", ["labels", "all"])
@pytest.mark.parametrize("scorer", ["gradient", "combined", "context", "random"])
@pytest.mark.parametrize(
    "head, name", [("sequence_classification", "bert"), ("sequence_classification", "llama"), ("question_answering", "bert")]
)
def test_a_loss_of_rows_chooses_among_all_tokens(head, name, scorer, pool):
    """Its label is that of the row: no token has one of its own, whatever the pool, and whenever the choice is made."""
    model, batch, _ = model_and_batch(name, head=head)
    taken = take_step(model, batch, token_scorer=scorer, select_from=pool)
    assert taken.selection["decoder"].counts == (5, 4)
    for chunk in (4, 512):  # of the context pass, whose chunks know nothing of the position that the head looks at
        with seeking_on(model, token_scorer=scorer, select_from=pool, context_chunk_size=chunk) as seeking:
            found = seeking.inspect(dict(batch)).selection["decoder"]
        assert found.counts == (5, 4) and (scorer == "random" or torch.equal(found.kept_mask(), taken.kept["decoder"]))


@pytest.mark.parametrize("name, side", QUESTION)
def test_start_and_end_are_kept_whatever_their_score(name, side):
    model, batch, dtype = model_and_batch(name, side, "question_answering")
    answer = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
    taken = take_step(model, batch, scorer=worst_at(answer))
    assert taken.kept["decoder"].gather(1, answer).all()
    loss, expected = pooled_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


def test_pooled_heads_see_the_logits_of_a_plain_forward():
    """Constants or not, every token is there: ditching must not change what the head computes."""
    for name, head in [("bert", "sequence_classification"), ("llama", "sequence_classification")]:
        model, batch, dtype = model_and_batch(name, head=head)
        taken = take_step(model, batch)
        assert torch.allclose(taken.outputs.logits, model(**batch).logits, rtol=1e-12, atol=1e-12)


# -- siblings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, name", [("sequence_classification", "llama"), ("sequence_classification", "bert"), ("question_answering", "bert")]
)
def test_a_wrong_kept_mask_is_noticed(head, name):
    model, batch, _ = model_and_batch(name, head=head)
    taken = take_step(model, batch, **SPREAD)
    wrong = taken.kept["decoder"].roll(1, 1) & batch["attention_mask"].bool()
    _, expected = pooled_twin(model, batch, {"decoder": wrong})
    assert worst_difference(taken.gradients, expected) > NOTICED


def test_a_ditched_pooled_position_is_noticed():
    """Without the rule that keeps it, no gradient at all would reach the body of a classifier."""
    model, batch, _ = classified("llama", "right")
    kept = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    kept[:, :3] = True
    taken = take_step(model, batch)
    _, expected = pooled_twin(model, batch, {"decoder": kept})
    assert worst_difference(taken.gradients, expected) > NOTICED
    assert all(not g.any() for name, g in expected.items() if name != "score.weight")
    assert all(g.any() for g in taken.gradients.values())


def test_ranking_by_loss_is_refused_for_a_pooled_head():
    model, batch, _ = classified("bert", "right")
    with pytest.raises(ValueError, match="one loss for a row"):
        take_step(model, batch, token_scorer="loss")


def test_unlabelled_batches_of_a_pooled_head_run():
    """Prediction in training mode: nothing to lose, nothing to score by gradient."""
    model, batch, _ = classified("bert", "right")
    del batch["labels"]
    plain = model(**batch).logits
    for scorer in ("context", "combined"):
        with seeking_on(model, token_scorer=scorer):
            outputs = model(**batch)
        assert outputs.loss is None and torch.allclose(outputs.logits, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scorer", ["combined", "context"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_loss_of_ones_own_on_a_pooled_head_equals_the_twin(name, scorer):
    """Without labels in the batch; chosen in backward, or at once where no gradient has a say."""
    model, batch, dtype = classified(name, "right")
    labels = batch.pop("labels")
    ear = Ear()
    with seeking_on(model, token_scorer=scorer, **SPREAD) as seeking:
        seeking.listeners.add(ear)
        found = gradients(model, F.multi_margin_loss(model(**batch).logits, labels))
    kept = {"decoder": ear.selections[0]["decoder"].kept_mask()}
    with ditching(model, kept):
        loss = F.multi_margin_loss(model(**batch).logits, labels)
    assert len(ear.selections) == 1
    assert worst_difference(found, gradients(model, loss)) <= tolerance(dtype)
    assert worst_difference(found, gradients(model, F.multi_margin_loss(model(**batch).logits, labels))) > NOTICED


@pytest.mark.parametrize("ratio", [1.0, 0.999])  # the model's own way; all tokens, but through the method
def test_label_smoothing_is_that_of_torch(ratio):
    model, batch, _ = model_and_batch("llama")
    taken = take_step(model, batch, token_ratio=ratio, label_smoothing=0.1)
    logits, labels = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    unsmoothed = gradients(model, F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels))
    found = gradients(model, expected)
    assert torch.allclose(taken.loss, expected, rtol=1e-12)
    assert worst_difference(taken.gradients, found) < 1e-12
    assert worst_difference(taken.gradients, unsmoothed) > NOTICED
