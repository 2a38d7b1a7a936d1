"""Every token with a label, none drawn; and losses weighed by the probability of their label (DFT)."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from hf_memtune import ConfigError, TokenSeekingConfig
from hf_memtune.core.scorers import SeekingContext
from tests.support.stepping import assert_equal_step, model_and_batch, plain_twin, seeking_on, step_on, take_step, token_twin
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, shifted, twin_loss, worst_difference

LABELLED = {"token_selection": "labelled"}


def with_prompts(name, **more):
    model, batch, dtype = model_and_batch(name, **more)
    batch["labels"][0, :6] = batch["labels"][1, :3] = -100
    return model, batch, dtype


def labelled_of(batch):
    return (shifted(batch["labels"]) != -100) & batch["attention_mask"].bool()


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral-sliding"])
def test_all_labels_are_learned_and_prompts_are_constants(name, chunk):
    model, batch, dtype = with_prompts(name)
    taken = take_step(model, batch, context_chunk_size=chunk, **LABELLED)
    assert torch.equal(taken.kept["decoder"], labelled_of(batch))
    assert_equal_step(taken, *token_twin(model, batch, taken.kept, "causal_lm"), dtype, name in ("gemma2", "llama", "mistral-sliding"))
    plain, expected = plain_twin(model, batch, torch.ones_like(taken.kept["decoder"]))
    assert abs(taken.loss - plain) <= tolerance(dtype, True) * plain  # the loss is that of plain training
    assert worst_difference(taken.gradients, expected) > NOTICED  # the gradient through the prompt is cut


def test_skip_with_a_threshold_of_0_is_plain_training():
    model, batch, dtype = with_prompts("llama")
    taken = take_step(model, batch, token_gradient="skip", skip_threshold=0.0, sequence_chunk_size=4, **LABELLED)
    loss, expected = plain_twin(model, batch, taken.kept["decoder"])
    assert abs(taken.loss - loss) <= tolerance(dtype, True) * loss
    assert worst_difference(taken.gradients, expected) <= tolerance(dtype, True)


def test_no_score_is_computed(monkeypatch):
    def asked(*args):
        raise AssertionError("a score was asked for")

    model, batch, _ = with_prompts("llama")
    for name in ("context_score", "gradient_score", "token_loss", "true_gradient", "last_hidden_state"):
        monkeypatch.setattr(SeekingContext, name, property(asked))
    for scorer in ("combined", "random", "true_gradient"):
        take_step(model, batch, token_scorer=scorer, **LABELLED)
    with pytest.raises(AssertionError, match="a score was asked for"):
        take_step(model, batch, token_scorer="combined")


def test_any_other_loss_keeps_the_tokens_it_is_of():
    model, batch, _ = with_prompts("gpt2")
    wanted = torch.zeros_like(batch["attention_mask"]).bool()
    wanted[0, 4:7] = wanted[1, 2] = True
    with seeking_on(model, **LABELLED) as seeking:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found = gradients(model, (model(**inputs).logits.square().mean(-1) * wanted).sum())
        assert seeking.architecture is not None
    from tests.support.twin import ditching

    with ditching(model, {"decoder": wanted}):
        expected = gradients(model, (model(**inputs).logits.square().mean(-1) * wanted).sum())
    assert worst_difference(found, expected) <= tolerance(torch.float64)


def test_what_it_does_not_read_is_said():
    idle = TokenSeekingConfig(token_seeking=True, token_ratio=0.2, token_scorer="loss", **LABELLED).ineffective()
    assert idle == dict.fromkeys(("token_ratio", "token_scorer"), "with token_selection=labelled")
    assert not TokenSeekingConfig(token_seeking=True, **LABELLED).ineffective()
    with pytest.raises(ConfigError, match="'labelled' with token_gradient=stream, which is plain training"):
        TokenSeekingConfig(token_seeking=True, token_gradient="stream", **LABELLED)
    with pytest.raises(ConfigError, match="'once' with token_selection=labelled"):
        TokenSeekingConfig(token_seeking=True, seek_schedule="once", **LABELLED)


# -- weights ---------------------------------------------------------------------------------------------------------

WEIGHED = [
    {"token_scorer": "random", "select_from": "labels"},
    {"token_scorer": "combined"},
    {"token_gradient": "stream", "sequence_chunk_size": 4},
    LABELLED,
]


def weighed_twin(model, batch, kept, cut):
    """Mean over kept labels of p CE, p the probability of the label, a constant; of a full forward."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    from contextlib import nullcontext

    from tests.support.twin import ditching

    with ditching(model, {"decoder": kept}) if cut else nullcontext():
        logits = model(**inputs).logits
    target = shifted(batch["labels"]).masked_fill(~kept, -100)
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    loss = (losses * (-losses.detach()).exp() * (target != -100)).sum() / (target != -100).sum()
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("settings", WEIGHED, ids=str)
def test_dft_weighs_each_kept_loss_by_the_probability_of_its_label(settings):
    model, batch, _ = with_prompts("gpt2")
    taken = take_step(model, batch, token_weight="dft", **settings)
    loss, expected = weighed_twin(model, batch, taken.kept["decoder"], cut="token_gradient" not in settings)
    limit = tolerance(torch.float32)  # probabilities are float32
    assert abs(taken.loss - loss) <= limit * loss and worst_difference(taken.gradients, expected) <= limit
    unweighed = twin_loss(model, batch, taken.kept, causal_lm=True)
    assert abs(taken.loss - unweighed) > NOTICED * unweighed  # the sibling


@pytest.mark.parametrize("settings", [{"token_scorer": "random", "always_keep": "none"}, {"token_scorer": "combined"}, LABELLED], ids=str)
def test_dft_weighs_what_a_decoder_learns(settings):
    """Tokens of the encoder are chosen as without, and have no loss to weigh."""
    from tests.support.twin import ditching

    model, batch, _ = model_and_batch("bart")
    taken = take_step(model, batch, token_weight="dft", **settings)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    with ditching(model, taken.kept):
        logits = model(**inputs).logits
    target = batch["labels"].masked_fill(~taken.kept["decoder"], -100)
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    expected = (losses * (-losses.detach()).exp()).sum() / (target != -100).sum()
    limit = tolerance(torch.float32)
    assert abs(taken.loss - expected) <= limit * expected and worst_difference(taken.gradients, gradients(model, expected)) <= limit
    unweighed = twin_loss(model, batch, taken.kept, causal_lm=False)
    assert abs(taken.loss - unweighed) > NOTICED * unweighed  # the sibling


def test_dft_is_refused_where_it_has_nothing_to_weigh():
    with pytest.raises(ConfigError, match="token_weight: got 'dft' with token_ratio=1.*loss_type=dft"):
        TokenSeekingConfig(token_seeking=True, token_ratio=1.0, token_weight="dft")
    with pytest.raises(ConfigError, match="token_weight: got 'some', expected one of"):
        TokenSeekingConfig(token_seeking=True, token_weight="some")
    model, batch, _ = model_and_batch("llama", head="sequence_classification")
    with pytest.raises(ConfigError, match="token_weight: got 'dft' with Llama.*one loss for a row"):
        seeking_on(model, token_weight="dft")


def of_logits_alone(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.square().mean()


def of_logits_beside_labels(model, batch):
    return model(**batch).logits.square().mean()


def test_dft_is_refused_where_the_loss_is_taken_before_tokens_are_chosen():
    """The body would be weighed, and the head, which has learned from all tokens by then, would not."""
    with pytest.raises(ConfigError, match="token_weight: got 'dft' with token_scorer=true_gradient"):
        TokenSeekingConfig(token_seeking=True, token_scorer="true_gradient", token_weight="dft")
    TokenSeekingConfig(token_seeking=True, token_scorer="true_gradient", token_weight="dft", **LABELLED)  # which does not wait for it
    model, batch, _ = with_prompts("gpt2")
    kinds = ({"token_scorer": "random"}, {"token_gradient": "stream", "sequence_chunk_size": 4}, LABELLED)
    for take, settings in product((of_logits_alone, of_logits_beside_labels), kinds):
        with seeking_on(model, token_weight="dft", **settings), pytest.raises(ConfigError, match="token_weight: got 'dft', but a loss"):
            take(model, batch).backward()


def test_a_head_does_not_learn_from_tokens_that_are_left_out():
    """Where they are chosen after the loss is taken; the remedy is one. Scores that stand for all tokens change no objective."""
    model, batch, _ = with_prompts("llama")
    for take in (of_logits_alone, of_logits_beside_labels):
        with (
            seeking_on(model, token_scorer="profit"),
            pytest.raises(ConfigError, match="token_scorer: got 'profit'.*get_output_embeddings"),
        ):
            take(model, batch).backward()
        with seeking_on(model, token_scorer="gradient"):
            take(model, batch).backward()
    model.get_output_embeddings().requires_grad_(False)
    with seeking_on(model, token_scorer="profit"):
        of_logits_beside_labels(model, batch).backward()


# -- drawing by size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["softmax_residual", "true_gradient"])
def test_weights_are_one_over_probabilities_that_follow_the_size(scorer):
    """By the selection's own weights: the larger the score of a token that was drawn, the smaller its weight, and none above the bound."""
    model, batch, _ = with_prompts("gpt2", lengths=(16, 16))
    settings = {"token_scorer": scorer, "token_selection": "sample", "select_from": "labels", "token_ratio": 0.2}
    with seeking_on(model, **settings) as seeking:
        found = seeking.inspect(batch, (scorer,))
        scores, selection = found.scores["decoder"][scorer], found.selection["decoder"]
        taken = [step_on(model, seeking, batch).selection["decoder"] for _ in range(4)]
    labelled = labelled_of(batch)
    assert (selection.weight <= labelled.sum(1)[:, None] / (torch.tensor(selection.counts)[:, None] * 0.25) + 1e-4).all()
    seen = {}
    for each in [selection, *taken]:
        for row in range(2):
            for token, weight, valid in zip(each.index[row], each.weight[row], each.valid[row]):
                if valid:
                    seen[row, int(token)] = float(weight)
    for row in range(2):
        order = sorted((token for r, token in seen if r == row), key=lambda token: float(scores[row, token]))
        weights = [seen[row, token] for token in order]
        assert weights == sorted(weights, reverse=True) and len(set(weights)) > 1
