"""What token seeking does where nothing but token_seeking is set: tokens drawn evenly among those with a label."""

import pytest
import torch
from transformers import Trainer

from hf_memtune import ConfigError, TokenSeeking, TokenSeekingConfig
from tests.support.runs import arguments, llama, text_rows, train, trainer_for, worst_step
from tests.support.stepping import step_on
from tests.support.tiny_models import batch_for, tiny_model
from tests.support.tolerances import NOTICED

ROWS = text_rows(8)
LEFT_OUT = {"token_scorer": None, "token_selection": None, "select_from": None, "context_normalize": None, "token_ratio": 0.2}


def first_tokens(seen):
    return -torch.arange(seen.attention_mask.shape[1]).expand(seen.attention_mask.shape)


def mean_loss(outputs, labels, num_items_in_batch=None):
    shifted = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), shifted, reduction="sum") / num_items_in_batch


def sharp_loss(outputs, labels, num_items_in_batch=None):
    """No cross entropy."""
    shifted = labels[:, 1:].flatten()
    losses = -outputs.logits[:, :-1].flatten(0, 1).log_softmax(-1).gather(1, shifted.clamp_min(0)[:, None])[:, 0]
    return (losses + losses**2)[shifted != -100].sum() / num_items_in_batch


def test_labelled_tokens_are_drawn_and_weighed(tmp_path):
    run = train(llama(), arguments(tmp_path, **LEFT_OUT), ROWS)
    selection = run.trainer.last_selection
    logs = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["tokens_kept"] == entry["tokens_learned"] for entry in logs)
    assert selection.weight is not None and selection.weight.max() > 1


def test_the_papers_choice_learns_from_fewer(tmp_path):
    """Sibling: without the defaults kept tokens carry no label here and there."""
    run = train(llama(), arguments(tmp_path, preset="tokentune", **LEFT_OUT), ROWS)
    logs = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert any(entry["tokens_learned"] < entry["tokens_kept"] for entry in logs)
    assert run.trainer.last_selection.weight is None


def test_a_loss_for_a_row_has_no_tokens_to_weigh():
    model = tiny_model("bert", head="sequence_classification")
    batch = batch_for(model, head="sequence_classification")
    seeking = TokenSeeking(model, TokenSeekingConfig(token_seeking=True))
    found = seeking.config
    assert (found.token_scorer, found.token_selection, found.kept_always) == ("context", "top", "none")
    taken = step_on(model, seeking, batch)
    assert taken.selection["decoder"].weight is None
    seeking.remove()
    with pytest.raises(ConfigError, match="token_selection: got 'sample'"):
        TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_selection="sample"))


@pytest.mark.parametrize("given, scorer", [({"preset": "tokentune"}, "random"), ({"token_scorer": "random"}, "random"), ({}, "context")])
def test_what_is_given_stays_for_a_loss_for_a_row(given, scorer):
    settings = TokenSeekingConfig(token_seeking=True, **given)
    found = settings.for_row_loss()
    assert found.token_scorer == scorer and found.for_row_loss() == found
    assert settings.token_scorer == "random"  # and the settings themselves


@pytest.mark.parametrize("loss", [mean_loss, sharp_loss], ids=["cross entropy", "of logits"])
def test_a_loss_function_of_ones_own_learns_from_a_sample(tmp_path, loss):
    run = train(llama(), arguments(tmp_path, **LEFT_OUT), ROWS, compute_loss_func=loss)
    selection = run.trainer.last_selection
    assert selection.weight is not None and selection.weight.max() > 1
    assert all(0 < entry["tokens_kept"] == entry["tokens_learned"] for entry in run.trainer.state.log_history if "loss" in entry)
    plain = train(llama(), arguments(tmp_path, seeking=False), ROWS, Trainer, compute_loss_func=loss)
    assert worst_step(run, plain) > NOTICED
    assert (run.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)) == (loss is sharp_loss)  # tokens are chosen in backward


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_only_scores_can_be_kept(tmp_path, schedule):
    """A random choice has none; a function has, which the arguments know nothing of."""
    args = arguments(tmp_path, seek_schedule=schedule, **LEFT_OUT)
    with pytest.raises(ConfigError, match="needs no pass over the data set"):
        trainer_for(llama(), args, ROWS)
    assert train(llama(), args, ROWS, token_scorer=first_tokens).trainer.last_selection is not None
