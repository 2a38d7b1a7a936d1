"""Selection against a slow choice by sorting Python lists."""

import pytest
import torch

from hf_memtune.core.selection import Selection, budget, kept_counts, select


@pytest.mark.parametrize(
    "real, ratio, kept",
    [(10, 0.1, 1), (30, 0.1, 3), (31, 0.1, 4), (1, 0.1, 1), (7, 1.0, 7), (100, 0.29, 29), (3, 0.999, 3), (1000, 0.001, 1)],
)
def test_the_budget_is_rounded_up_and_at_least_one(real, ratio, kept):
    assert budget(real, ratio) == kept


def test_the_budget_is_exact_for_every_fraction():
    """0.1 * 30 is 3.0000000000000004 in binary; what was meant is 3."""
    for tokens in range(1, 400):
        for hundredths in range(1, 101):
            assert budget(tokens, hundredths / 100) == max(1, -(-hundredths * tokens // 100))


def slow_select(scores, ratio, real, candidates, forced):
    """One row at a time: forced tokens first, then the best candidates, then (where there is none) the best real token."""
    chosen = []
    for row in range(scores.shape[0]):
        tokens = [t for t in range(scores.shape[1]) if real[row, t]]
        allowed = [t for t in tokens if candidates[row, t]]
        must = [t for t in range(scores.shape[1]) if forced[row, t]]
        pool = sorted((t for t in allowed or tokens if t not in must), key=lambda t: (-scores[row, t].item(), t))
        size = min(budget(len(tokens), ratio), len(set(allowed) | set(must))) if allowed else 1
        chosen.append(sorted(must + pool[: max(0, max(size, 1) - len(must))]))
    return chosen


@pytest.mark.parametrize("ratio", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("with_candidates", [False, True])
@pytest.mark.parametrize("with_forced", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_selection_is_that_of_a_slow_sort(ratio, with_candidates, with_forced, seed):
    torch.manual_seed(seed)
    scores = torch.randint(0, 6, (4, 13)).float()  # few values, so that ties occur
    real = torch.arange(13) < torch.tensor([13, 9, 5, 1])[:, None]
    real = real.flip(1) if seed % 2 else real
    candidates = torch.rand(4, 13) < 0.4 if with_candidates else torch.ones(4, 13, dtype=torch.bool)
    forced = (torch.rand(4, 13) < 0.15) & real if with_forced else torch.zeros(4, 13, dtype=torch.bool)
    found = select(scores, ratio, real, candidates if with_candidates else None, forced if with_forced else None)
    expected = slow_select(scores, ratio, real, candidates, forced)
    assert [row.nonzero().flatten().tolist() for row in found.kept_mask()] == expected
    assert list(found.counts) == [len(row) for row in expected]


def test_a_row_is_made_of_distinct_ascending_positions_fillers_included():
    """Duplicates would each hand the full gradient to the token they stand for."""
    torch.manual_seed(0)
    real = torch.arange(13) < torch.tensor([13, 9, 2])[:, None]
    found = select(torch.rand(3, 13), 0.5, real)
    assert found.is_ragged and found.counts == (7, 5, 1) and found.width == 7
    assert (found.index.diff(dim=1) > 0).all()
    assert found.valid.sum(1).tolist() == list(found.counts)


@pytest.mark.parametrize("side", ["right", "left"])
def test_valid_marks_the_chosen_and_not_the_fillers(side):
    """The fillers stand among the chosen in order of position: marking the first `count` would mark the wrong ones."""
    real = torch.arange(6) < torch.tensor([6, 3])[:, None]
    real = real.flip(1) if side == "left" else real
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6]])
    found = select(scores, 0.5, real)
    best = scores.masked_fill(~real, -torch.inf)[1].argsort(descending=True)[:2]
    assert set(found.index[1][found.valid[1]].tolist()) == set(best.tolist())


def test_padding_is_never_chosen_whatever_its_score():
    real = torch.tensor([[True, True, False, False]])
    assert select(torch.tensor([[0.0, 1.0, 9.0, torch.inf]]), 1.0, real).kept_mask().tolist() == [[True, True, False, False]]


def test_forced_tokens_enlarge_a_budget_that_is_too_small():
    forced = torch.tensor([[True, False, True, True]])
    assert select(torch.tensor([[0.0, 9.0, 0.0, 0.0]]), 0.25, forced=forced).kept_mask().equal(forced)


def test_without_anything_to_keep_a_row_keeps_one_token():
    found = select(torch.rand(2, 4), 0.5, torch.tensor([[True] * 4, [False] * 4]))
    assert found.counts == (2, 1)


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 2), (1, 7), (1, 7, 2, 2)])
def test_gather_takes_the_selected_entries(shape):
    torch.manual_seed(0)
    values = torch.rand(shape)
    found = select(torch.rand(3, 7), 0.4)
    expected = torch.stack([values.expand(3, *shape[1:])[row][found.index[row]] for row in range(3)])
    assert found.gather(values).equal(expected)


def test_gather_fills_what_is_not_chosen():
    selection = Selection(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[True, True], [False, True]]), (2, 1), 3)
    values = torch.tensor([[10, 11, 12], [20, 21, 22]])
    assert selection.gather(values, fill=-100).tolist() == [[10, 12], [-100, 22]]
    assert selection.gather(values).tolist() == [[10, 12], [21, 22]]
    assert selection.kept_mask().tolist() == [[True, False, True], [False, False, True]]


def test_a_tie_goes_to_the_earlier_token():
    assert select(torch.zeros(1, 6), 0.5).index.tolist() == [[0, 1, 2]]


def test_chosen_tokens_carry_no_weight():
    """They estimate nothing but themselves; a draw does (test_sampling)."""
    assert select(torch.rand(2, 6), 0.5).weight is None


def test_the_budget_may_be_asked_to_reach_beside_the_forced_tokens():
    forced = torch.tensor([[True, True, False, False], [True, False, False, False], [True] * 4])
    assert kept_counts(3, 4, 0.25, None, None, forced) == [2, 1, 4]
    assert kept_counts(3, 4, 0.25, None, None, forced, beside_forced=1) == [3, 2, 4]
    assert kept_counts(3, 4, 0.25, None, forced, forced, beside_forced=1) == [2, 1, 4]  # nothing else may be kept
