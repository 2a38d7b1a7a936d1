"""Sampling against its promises: the probabilities of a slow loop, met by frequencies, and sums that are right on average."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_memtune.core.sampling import CERTAIN, Draw, base_probability, in_units, inclusion_probability, probabilities, sample, systematic
from hf_memtune.core.selection import budget, select
from tests.support.chances import slow_probability
from tests.support.tolerances import NOTICED, close, tolerance

DRAWS = 20_000
STANDARD_ERRORS = 5  # of a mean over DRAWS: by chance one comparison in two million is further off, and the seed is fixed


def batch(seed=0):
    """Four rows of 13 scores with ties and outliers, ragged, some tokens no candidates, some forced."""
    torch.manual_seed(seed)
    scores = torch.randint(-3, 4, (4, 13)).double().exp()
    real = torch.arange(13) < torch.tensor([13, 11, 9, 5])[:, None]
    candidates = (torch.arange(13) % 5 != 3).expand(4, 13) & real
    forced = torch.zeros_like(real)
    forced[0, 0], forced[1, 3] = True, True  # the second is no candidate
    return scores, real, candidates, forced


def eligible(real, candidates, forced):
    return (candidates & real) | forced


def repeated(*rows):
    """Many copies of a row, so that one call draws many times."""
    return [row[None].expand(DRAWS, *row.shape) for row in rows]


def estimates(selection, values):
    """Weighted sums of the kept of `values` (T,), one a row."""
    kept = selection.gather(values.expand(selection.index.shape[0], -1))
    return (kept * selection.weight * selection.valid).sum(1)


def off_by(found, expected):
    """How far the mean of `found` lies from `expected`, in standard errors."""
    return ((found.double().mean(0) - expected).abs() / (found.double().std(0) / len(found) ** 0.5)).max()


# -- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_those_of_a_slow_loop(seed):
    scores, _, pool, _ = batch(seed)
    sizes = pool.sum(1)
    for draws in range(1, 6):
        k = torch.minimum(torch.full_like(sizes, draws), sizes)[:, None]
        found = inclusion_probability(base_probability(scores, pool), k)
        expected = torch.stack([slow_probability(scores[row], pool[row], k[row].item()) for row in range(4)])
        torch.testing.assert_close(found, expected, **close(torch.float64))
        wrong = inclusion_probability(base_probability(scores, pool.roll(1, 1)), k)
        assert ((wrong - expected).abs().amax(1) > NOTICED).any()


def test_probabilities_grow_with_the_score():
    scores, k = torch.randn(3, 40).sort(dim=1).values, torch.tensor([[1], [9], [30]])
    probability = inclusion_probability(base_probability(scores, torch.ones(3, 40, dtype=torch.bool)), k)
    assert (probability.diff(dim=1) >= 0).all() and (probability[:, -1] > probability[:, 0]).all()
    torch.testing.assert_close(probability.sum(1), torch.tensor([1.0, 9, 30]).double(), **close(torch.float64))


def test_frequencies_are_the_probabilities():
    rows = batch()
    for scores, *masks in zip(*rows):
        found = sample(*repeated(scores), 0.4, *repeated(*masks)).kept_mask()
        real, candidates, forced = masks
        draws = int(found[0].sum() - forced.sum())
        expected = slow_probability(scores, candidates & real & ~forced, draws).masked_fill(forced, 1)
        bound = STANDARD_ERRORS * (expected * (1 - expected) / DRAWS).sqrt()
        off = (found.double().mean(0) - expected).abs()
        assert (off <= bound).all()
        assert ((found.double().mean(0) - draws / 13).abs() > bound).any()  # the sibling: even draws


def test_what_is_told_of_a_draw_is_what_it_draws_with():
    """Probabilities of all tokens: those of a slow loop, and one over the weights of whatever is kept."""
    scores, *masks = batch()
    found, drawn = probabilities(scores, 0.4, *masks), sample(scores, 0.4, *masks)
    weight = drawn.weight.double()[drawn.valid]
    torch.testing.assert_close(1 / drawn.gather(found)[drawn.valid], weight, **close(torch.float32))
    assert not torch.allclose(1 / drawn.gather(found.roll(1, 1)).clamp_min(NOTICED)[drawn.valid], weight)  # the sibling
    torch.testing.assert_close(found.sum(1), torch.tensor(drawn.counts).double(), **close(torch.float64))
    for row, (real, candidates, forced) in enumerate(zip(*masks)):
        draws = drawn.counts[row] - int(forced.sum())
        expected = slow_probability(scores[row], candidates & real & ~forced, draws).masked_fill(forced, 1)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=2 / CERTAIN)


# -- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(4))
def test_weighted_sums_are_those_of_all_eligible_tokens_on_average(row):
    scores, *masks = (part[row] for part in batch())
    values = torch.randn(13, dtype=torch.float64) + scores.log()  # tokens that score high differ from those that do not
    true = values[eligible(*masks)].sum()
    drawn = sample(*repeated(scores), 0.4, *repeated(*masks))
    assert off_by(estimates(drawn, values), true) < STANDARD_ERRORS


@pytest.mark.parametrize("row", range(4))
def test_unweighted_sums_and_those_of_the_best_tokens_are_not(row):
    scores, *masks = (part[row] for part in batch())
    values = torch.randn(13, dtype=torch.float64) + scores.log()
    true, tokens = values[eligible(*masks)].sum(), int(eligible(*masks).sum())
    drawn = sample(*repeated(scores), 0.4, *repeated(*masks))
    unweighted = drawn.gather(values.expand(DRAWS, -1)).mean(1) * tokens
    best = select(scores[None], 0.4, *(mask[None] for mask in masks)).gather(values[None]).mean() * tokens
    assert off_by(unweighted, true) > 2 * STANDARD_ERRORS
    assert (best - true).abs() > NOTICED * true.abs()


def test_the_even_half_bounds_every_weight():
    """One token far above the rest would make all others next to impossible: with the even half no weight exceeds 2 n / k."""
    scores = torch.cat([torch.rand(1, 99) * 1e-3, torch.ones(1, 1)], dim=1)
    pool, k = torch.ones(1, 100, dtype=torch.bool), torch.tensor([[10]])
    probability = inclusion_probability(base_probability(scores, pool), k)
    assert 1 / probability.min() <= 2 * 100 / 10
    by_score_alone = inclusion_probability(scores.double() / scores.sum(), k)
    assert 1 / by_score_alone.min() > 2 * 100 / 10  # the sibling
    weights = [sample(scores, 0.1).weight.max() for _ in range(50)]
    assert max(weights) <= 2 / 0.1 * (1 + tolerance(torch.float32))


def slow_sizes(scores, pool, floor):
    """Of one row: a part evenly, a part in proportion to the score."""
    inside = [float(s) if p else 0.0 for s, p in zip(scores, pool)]
    return torch.tensor([p * (floor / sum(pool.tolist()) + (1 - floor) * s / sum(inside)) for s, p in zip(inside, pool.tolist())])


@pytest.mark.parametrize("floor", [0.1, 0.25, 1.0])
def test_probabilities_by_size_are_proportional_to_the_scores(floor):
    scores, _, pool, _ = batch(2)
    found = base_probability(scores, pool, Draw(floor, by_size=True))
    expected = torch.stack([slow_sizes(*row, floor) for row in zip(scores, pool)]).double()
    torch.testing.assert_close(found, expected, **close(torch.float32))
    by_place = base_probability(scores, pool, Draw(floor))
    assert floor == 1 or (by_place - expected).abs().max() > NOTICED  # the sibling
    smallest = scores.masked_fill(~pool, torch.inf).amin(1, keepdim=True)
    assert floor == 1 or not torch.allclose(base_probability(scores - 0.9 * smallest, pool, Draw(floor, True)), found)  # sizes, not places


def test_no_number_counts_as_0_and_endless_sizes_take_all():
    odd = torch.tensor([[1.0, torch.nan, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [torch.inf, 1.0, -torch.inf, -2.0]])
    found = base_probability(odd, torch.ones(3, 4, dtype=torch.bool), Draw(0.2, by_size=True))
    expected = torch.tensor([[0.25, 0.05, 0.05, 0.65], [0.25] * 4, [0.45, 0.05, 0.45, 0.05]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **close(torch.float64))


def test_the_size_of_a_signed_sum_is_its_magnitude():
    """A large negative one is as likely as a positive one, and the estimate stays unbiased."""
    sums = torch.tensor([-8.0, 1.0, 0.5, 2.0, -0.5, 4.0], dtype=torch.float64)
    pool, how = torch.ones(1, 6, dtype=torch.bool), Draw(0.2, by_size=True)
    torch.testing.assert_close(base_probability(sums[None], pool, how), base_probability(-sums[None], pool, how), rtol=0, atol=0)
    chance = probabilities(sums[None], 0.5, how=how)[0]
    assert chance.argmax() == 0 and chance[0] > chance[5] > chance[3]
    by_place = probabilities(sums[None], 0.5, how=Draw(0.2))[0]
    assert by_place.argmin() == 0  # the sibling: places of signed sums
    drawn, values = sample(*repeated(sums), 0.5, how=how), torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0]).double()
    assert off_by(estimates(drawn, values), values.sum()) < STANDARD_ERRORS
    assert off_by(2 * drawn.kept_mask().double() @ values, values.sum()) > 2 * STANDARD_ERRORS  # the sibling: without the weights


@pytest.mark.parametrize("row", range(4))
def test_sums_by_size_are_unbiased_and_steadier_where_the_scores_are_the_values(row):
    """Proportional to what is summed, the draw has the least variance: far below that of even draws."""
    scores, *masks = (part[row] for part in batch())
    values = scores.double() + 0.05
    true = values[eligible(*masks)].sum()
    found, even = (estimates(sample(*repeated(values), 0.4, *repeated(*masks), how=how), values) for how in (Draw(0.05, True), Draw(1.0)))
    assert off_by(found, true) < STANDARD_ERRORS and off_by(even, true) < STANDARD_ERRORS
    assert found.var() < even.var() / 2


def test_the_floor_bounds_every_weight():
    scores, pool = torch.cat([torch.full((1, 99), 1e-9), torch.ones(1, 1)], dim=1), torch.ones(1, 100, dtype=torch.bool)
    for floor in (0.1, 0.25, 0.5):
        worst = 1 / inclusion_probability(base_probability(scores, pool, Draw(floor, True)), torch.tensor([[10]])).min()
        assert 100 / 10 < worst <= 100 / (10 * floor)


def test_a_cap_bounds_weights_and_nothing_else():
    torch.manual_seed(0)
    scores = torch.rand(64, 40)
    torch.manual_seed(1)
    free = sample(scores, 0.2, how=Draw(0.25, True))
    torch.manual_seed(1)
    capped = sample(scores, 0.2, how=Draw(0.25, True, cap=4.0))
    assert capped.index.equal(free.index) and capped.weight.equal(free.weight.clamp(max=4))
    assert free.weight.max() > 4


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["equal", "random", "one outlier", "nearly certain"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 4096])
def test_every_row_draws_exactly_its_number(kind, length):
    scores = {
        "equal": torch.zeros(64, length),
        "random": torch.randn(64, length),
        "one outlier": torch.arange(length).eq(length - 1).float().expand(64, length),
        "nearly certain": torch.ones(64, length) + 1e-9 * torch.arange(length).double(),
    }[kind]
    pool = torch.ones(64, length, dtype=torch.bool)
    for draws in sorted({1, max(1, length // 3), max(1, length // 2), max(1, length - 1), length}):
        k = torch.full((64, 1), draws)
        units = in_units(inclusion_probability(base_probability(scores, pool), k), pool, k)
        assert (systematic(units).sum(1) == draws).all()
        assert (units > 0).all() and (units <= CERTAIN).all()


def test_sums_in_floating_point_do_not():
    """Why probabilities are integers: from a start at 0 each full unit takes one token, and the last may lack a rounding."""
    pool, k = torch.ones(64, 4096, dtype=torch.bool), torch.full((64, 1), 409)
    probability = inclusion_probability(base_probability(torch.randn(64, 4096), pool), k)
    assert (probability.cumsum(1)[:, -1].floor() != 409).any()
    assert (in_units(probability, pool, k).sum(1) == 409 * CERTAIN).all()


@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("given", range(8))
def test_the_budget_is_that_of_a_selection(ratio, given):
    scores, *masks = batch()
    masks = [mask if given >> bit & 1 else None for bit, mask in enumerate(masks)]
    found, chosen = sample(scores, ratio, *masks), select(scores, ratio, *masks)
    assert found.counts == chosen.counts
    assert found.valid.sum(1).tolist() == list(found.counts) and found.length == 13
    assert (found.index.diff(dim=1) > 0).all()


def test_forced_tokens_that_fill_the_budget_leave_one_draw_all_the_same():
    """Without it the other tokens could never be kept, and every sum would miss them."""
    scores, forced = torch.rand(10), torch.arange(10) < 2
    drawn = sample(*repeated(scores), 0.2, forced=repeated(forced)[0])
    assert drawn.counts[0] == 3 and select(scores[None], 0.2, forced=forced[None]).counts == (2,)
    assert off_by(estimates(drawn, torch.arange(10.0)), 45) < STANDARD_ERRORS


# -- who may be drawn ------------------------------------------------------------------------------------------------


def test_padding_and_what_is_no_candidate_are_never_drawn():
    scores, real, candidates, forced = batch()
    scores = scores.masked_fill(~real, torch.inf)
    for _ in range(200):
        assert not (sample(scores, 0.4, real).kept_mask() & ~real).any()
        assert not (sample(scores, 0.4, real, candidates, forced).kept_mask() & ~eligible(real, candidates, forced)).any()
    without = [sample(scores, 0.4).kept_mask() & ~real for _ in range(5)]
    assert any(kept.any() for kept in without)  # the sibling: nothing says what is padding


def test_forced_tokens_are_always_kept_and_count_once():
    scores, real, candidates, forced = batch()
    for _ in range(200):
        found = sample(scores, 0.4, real, candidates, forced)
        assert (found.kept_mask() & forced).equal(forced)
        assert (found.weight[found.gather(forced)] == 1).all()
    assert any(not (sample(scores, 0.4, real, candidates).kept_mask() & forced).equal(forced) for _ in range(50))


def test_a_row_without_candidates_draws_one_of_its_real_tokens():
    real = torch.arange(6) < 4
    drawn = sample(*repeated(torch.arange(6.0)), 0.5, *repeated(real, torch.zeros(6, dtype=torch.bool)))
    assert set(drawn.counts) == {1} and drawn.kept_mask().any(0).equal(real)
    assert off_by(estimates(drawn, torch.arange(6.0)), 6) < STANDARD_ERRORS


def test_ragged_rows_are_filled_up_and_fillers_weigh_one():
    real = torch.arange(13) < torch.tensor([13, 9, 2, 1])[:, None]
    found = sample(torch.rand(4, 13), 0.5, real)
    assert found.is_ragged and found.counts == (7, 5, 1, 1) and found.width == 7
    assert (found.index.diff(dim=1) > 0).all() and found.valid.sum(1).tolist() == [7, 5, 1, 1]
    assert (found.weight[~found.valid] == 1).all() and (found.weight[found.valid] >= 1).all()
    assert found.weight.dtype == torch.float32 and found.weight.shape == found.index.shape


def test_fillers_are_real_tokens_as_long_as_there_are_any():
    """As in a selection: padding may have positions and keys that a model was never meant to run on."""
    real = torch.arange(12) >= torch.tensor([0, 6])[:, None]
    assert all((sample(torch.rand(2, 12), 0.5, real).index[1] >= 6).all() for _ in range(20))


def test_a_row_of_padding_keeps_one_token_like_a_selection():
    real = torch.tensor([[True] * 4, [False] * 4])
    found = sample(torch.rand(2, 4), 0.5, real)
    assert found.counts == select(torch.rand(2, 4), 0.5, real).counts == (2, 1) and found.weight.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 13, 1000])
def test_at_a_ratio_of_one_everything_is_kept_at_weight_one(length):
    found = sample(torch.randn(5, length), 1.0)
    assert found.kept_mask().all() and (found.weight == 1).all()
    assert length == 1 or (sample(torch.randn(5, length), 0.5).weight > 1).any()  # the sibling


# -- scores ----------------------------------------------------------------------------------------------------------

HUGE = torch.finfo(torch.float64).max
EXTREMES = {
    "lowest": [-torch.inf, 1.0, 2.0, 3.0],
    "highest": [torch.inf, 1.0, 2.0, 3.0],
    "both": [-torch.inf, torch.inf, 0.0, 0.0],
    "not a number": [torch.nan, 1.0, 2.0, 3.0],
    "nothing finite": [-torch.inf] * 4,
    "all infinite": [torch.inf] * 4,
    "no number at all": [torch.nan] * 4,
    "range": [-HUGE, HUGE, 0.0, 1.0],
    "tiny": [0.0, 5e-324, 0.0, 1e-320],
    "negative": [-4.0, -3.0, -2.0, -1.0],
}


@pytest.mark.parametrize("scores", EXTREMES.values(), ids=EXTREMES)
def test_extreme_scores_leave_the_estimate_as_it_is(scores):
    drawn = sample(*repeated(torch.tensor(scores, dtype=torch.float64)), 0.5)
    assert set(drawn.counts) == {2} and drawn.weight.max() <= 2 / 0.5 * (1 + tolerance(torch.float32))
    assert off_by(estimates(drawn, torch.tensor([3.0, -1.0, 4.0, 1.0])), 7) < STANDARD_ERRORS


@pytest.mark.parametrize("scores, expected", [
    ([-torch.inf, 5.0, 5.0, 5.0], [1 / 8, 7 / 24, 7 / 24, 7 / 24]),
    ([torch.nan, 5.0, 5.0, 5.0], [1 / 8, 7 / 24, 7 / 24, 7 / 24]),
    ([5.0, torch.inf, 5.0, -torch.inf], [1 / 4, 3 / 8, 1 / 4, 1 / 8]),
    ([-torch.inf] * 4, [1 / 4] * 4),
    ([7.0] * 4, [1 / 4] * 4),
    ([-2.0, -1.0, 0.0, -2.0], [1 / 8, 7 / 24, 11 / 24, 1 / 8]),
    ([-HUGE, HUGE, 0.0, 0.0], [1 / 8, 3 / 8, 1 / 4, 1 / 4]),
])  # fmt: skip
def test_the_place_of_a_score_between_the_lowest_and_the_highest_counts(scores, expected):
    found = base_probability(torch.tensor([scores], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), **close(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_scores_of_every_dtype_draw_as_their_values_do(dtype):
    scores = (8 * torch.randn(6, 50)).to(dtype)
    torch.manual_seed(1)
    found = sample(scores, 0.3)
    torch.manual_seed(1)
    same = sample(scores.double(), 0.3)
    assert found.index.equal(same.index) and found.weight.equal(same.weight)
    torch.manual_seed(1)
    assert not sample(-scores, 0.3).index.equal(found.index)


def test_a_seed_settles_the_draw():
    def seeded(seed):
        torch.manual_seed(seed)
        return sample(scores, 0.3).index

    scores = torch.rand(6, 50)
    assert seeded(1).equal(seeded(1)) and not seeded(1).equal(seeded(2))


def test_shapes_can_be_traced_without_values():
    with FakeTensorMode():
        found = sample(torch.rand(2, 40), 0.1)
    assert found.index.shape == found.weight.shape == (2, 4) and found.counts == (budget(40, 0.1),) * 2
