"""Scorers: what they see, what they must return, and how others are added."""

import pytest
import torch

from hf_memtune import ConfigError, SeekingContext, TokenScoreError, register_scorer
from hf_memtune.core import scorers
from hf_memtune.core.scorers import Scorer, make_scorer, scorer_names
from hf_memtune.core.scoring import combined_score
from hf_memtune.settings.scorers import BUILT_IN, OF_ONES_OWN

REAL = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
LABELLED = torch.tensor([[False, True, True, True, False], [False, True, True, False, False]])


def context(asked=None):
    """A context whose costly entries write down that they were asked for."""
    torch.manual_seed(0)
    values = {
        "context_score": torch.rand(2, 5),
        "gradient_score": torch.rand(2, 5),
        "token_loss": torch.rand(2, 5),
        "last_hidden_state": torch.rand(2, 5, 4),
        "true_gradient": torch.rand(2, 5),
        "softmax_residual": torch.rand(2, 5),
        "reference_loss": torch.rand(2, 5),
        "has_label": LABELLED,
    }
    asked = [] if asked is None else asked

    def compute(name):
        def run():
            asked.append(name)
            return values[name]

        return run

    return SeekingContext(torch.zeros(2, 5, dtype=torch.long), REAL, None, {name: compute(name) for name in values}), values


SINGLE = [("context", "context_score"), ("gradient", "gradient_score"), ("loss", "token_loss"), ("true_gradient", "true_gradient")]
SINGLE += [("softmax_residual", "softmax_residual")]


@pytest.mark.parametrize("name, entry", SINGLE)
def test_single_scores_are_handed_on_and_nothing_else_is_computed(name, entry):
    asked = []
    seen, values = context(asked)
    assert make_scorer(name)(seen).equal(values[entry])
    assert asked == [entry]


def test_what_changes_the_objective_is_one_line_each():
    asked = []
    seen, values = context(asked)
    profit, excess = make_scorer("profit")(seen), make_scorer("excess_loss")(seen)
    assert profit[LABELLED].equal((-values["token_loss"]).exp()[LABELLED])
    assert excess[LABELLED].equal((values["token_loss"] - values["reference_loss"])[LABELLED])
    assert sorted(asked) == ["has_label", "reference_loss", "token_loss"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_token_without_a_label_comes_last_where_losses_say_what_is_learned(name):
    """Its loss is 0, which would be the highest probability, and less than nothing is above the excess of what is learned already."""
    seen, values = context()
    values["token_loss"].masked_fill_(~LABELLED, 0.0)
    values["reference_loss"].masked_fill_(~LABELLED, 0.0).add_(2.0 * LABELLED)
    scores = make_scorer(name)(seen)
    last = all(scores[row][~LABELLED[row]].max() < scores[row][LABELLED[row]].min() for row in range(2))
    assert last is (name in ("loss", "profit", "excess_loss"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_sizes_are_those_of_gradients(name):
    assert make_scorer(name).facts.is_size is (name in ("true_gradient", "softmax_residual"))


@pytest.mark.parametrize(
    "alpha, beta, asked_for",
    [(1.0, 1.0, {"context_score", "gradient_score"}), (2.0, 0.0, {"context_score"}), (0.0, 2.0, {"gradient_score"})],
)
def test_combined_is_equation_5_and_a_weight_of_0_costs_nothing(alpha, beta, asked_for):
    asked = []
    seen, values = context(asked)
    expected = combined_score(values["context_score"], values["gradient_score"], alpha, beta, REAL)
    assert make_scorer("combined", alpha, beta)(seen).equal(expected)
    assert set(asked) == asked_for


def test_every_entry_is_computed_once():
    asked = []
    seen, _ = context(asked)
    for _ in range(2):
        seen.context_score, seen.gradient_score, seen.token_loss, seen.last_hidden_state, seen.true_gradient
    assert sorted(asked) == ["context_score", "gradient_score", "last_hidden_state", "token_loss", "true_gradient"]


def test_random_is_drawn_anew_from_torchs_generator():
    asked = []
    seen, _ = context(asked)
    scorer = make_scorer("random")
    torch.manual_seed(1)
    first, second = scorer(seen), scorer(seen)
    torch.manual_seed(1)
    assert scorer(seen).equal(first) and not second.equal(first)
    assert not scorer.facts.reads_model and not asked


@pytest.mark.parametrize("name", BUILT_IN)
def test_who_reads_the_model_is_known_beforehand(name):
    """Chance does not, and the gradient of the loss comes by itself, in backward."""
    assert make_scorer(name).facts.reads_model is (name not in ("random", "true_gradient"))


RUNS = [("combined", 1.0, True), ("combined", 0.0, False), ("gradient", 0.0, True), ("loss", 0.0, True)]
RUNS += [(name, 0.0, True) for name in ("softmax_residual", "profit", "excess_loss")]
RUNS += [("context", 1.0, False), ("random", 1.0, False), ("true_gradient", 1.0, False)]


@pytest.mark.parametrize("name, gradient_weight, runs", RUNS)
def test_who_runs_the_last_block_is_known_beforehand(name, gradient_weight, runs):
    assert make_scorer(name, 1.0, gradient_weight).facts.runs_last_block is runs


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_table_says_what_each_scorer_asks_for(name, weights):
    asked = []
    seen, _ = context(asked)
    scorer = make_scorer(name, *weights)
    scorer(seen)
    assert scorer.facts.reads == set(asked)


def test_of_a_function_of_ones_own_nothing_is_known():
    facts = Scorer("mine", lambda seen: seen.context_score).facts
    assert facts is OF_ONES_OWN and facts.reads_model and facts.reads_loss and facts.may_ask_for("true_gradient")
    assert not (facts.asks_for("true_gradient") or facts.runs_last_block or facts.is_size or facts.changes_objective)


def test_an_unknown_name_is_told_with_the_known_ones():
    with pytest.raises(ConfigError, match="token_scorer: got 'attention', expected one of combined, .*excess_loss, or a name given to"):
        make_scorer("attention")


def test_scores_are_not_differentiated():
    weight = torch.ones(2, 5, requires_grad=True)
    assert not Scorer("learned", lambda seen: weight * 2)(context()[0]).requires_grad


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(5, 2), torch.zeros(2, 5, 1), None, [[0.0] * 5] * 2], ids=str)
def test_a_wrong_shape_is_refused(wrong):
    with pytest.raises(TokenScoreError, match=r"'mine' returned .*expected a tensor of shape \(2, 5\)"):
        Scorer("mine", lambda seen: wrong)(context()[0])


def test_nan_is_refused_where_a_token_is_real():
    at_padding, at_token = torch.zeros(2, 5), torch.zeros(2, 5)
    at_padding[1, 4] = at_token[1, 0] = torch.nan
    Scorer("mine", lambda seen: at_padding)(context()[0])
    with pytest.raises(TokenScoreError, match="NaN"):
        Scorer("mine", lambda seen: at_token)(context()[0])


def test_registering_adds_a_name(monkeypatch):
    monkeypatch.setattr(scorers, "_REGISTERED", {})
    register_scorer("mine", lambda seen: seen.attention_mask.float())
    assert scorer_names() == [*BUILT_IN, "mine"]
    assert make_scorer("mine")(context()[0]).equal(REAL.float())


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_names_are_taken(name):
    with pytest.raises(ConfigError, match="built in"):
        register_scorer(name, lambda seen: seen.context_score)


def test_a_random_choice_draws_evenly_where_scores_are_probabilities():
    seen = SeekingContext(None, torch.ones(2, 5, dtype=torch.bool), None, {})
    assert torch.equal(make_scorer("random", sampling=True)(seen), torch.zeros(2, 5))
    assert len(make_scorer("random")(seen).unique()) == 10
