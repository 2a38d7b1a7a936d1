"""The first and the last token of a row, which TokenTune keeps whatever their score."""

import pytest
import torch

from tests.support.stepping import model_and_batch, take_step

LENGTHS = (13, 9)


def ends_of(batch):
    """(B, 2): the first and the last real token of each row, by hand."""
    return torch.tensor([[row.index(1), len(row) - 1 - row[::-1].index(1)] for row in batch["attention_mask"].tolist()])


def worst_at(positions):
    return lambda seen: torch.ones(seen.attention_mask.shape).scatter(1, positions, -1.0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_both_ends_are_kept_out_of_the_budget(name, side):
    model, batch, _ = model_and_batch(name, side, lengths=LENGTHS, **({"dtype": torch.float32} if side == "left" else {}))
    ends = ends_of(batch)
    taken = take_step(model, batch, scorer=worst_at(ends), always_keep="first_last")
    kept = taken.kept["decoder"]
    assert kept.gather(1, ends).all() and taken.selection["decoder"].counts == (5, 4)
    assert not (kept & (batch["attention_mask"] == 0)).any()
    without = take_step(model, batch, scorer=worst_at(ends), always_keep="none").kept["decoder"]
    assert not without.gather(1, ends).any()


def test_the_papers_random_tokens_have_both_ends_and_others_have_not():
    """What always_keep is where it is not given, over ten draws."""
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    ends = ends_of(batch)

    def always(**settings):
        found = []
        for seed in range(10):
            torch.manual_seed(seed)
            found.append(take_step(model, batch, token_ratio=0.2, **settings).kept["decoder"].gather(1, ends))
        return torch.stack(found).all()

    assert always(token_scorer="random", token_selection="top")
    assert not always(token_scorer="random", token_selection="sample")
    assert not always(token_scorer="random", token_selection="top", always_keep="none")
