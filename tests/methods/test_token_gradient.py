"""What the gradient of the kept tokens flows through: nothing of the others (cut), all of them (stream), or what matters (skip); and
whether it estimates the gradient of all tokens without bias (sample)."""

import pytest
import torch

from hf_memtune import TokenSeeking, TokenSeekingConfig
from hf_memtune.core.rng import RandomTape
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.methods.seeking.choice import Choice
from hf_memtune.methods.seeking.streamed import SkippingStream
from tests.support.composition import whole_error
from tests.support.stepping import model_and_batch, plain_twin, seek_in_stream, seeking_on, step_on, take_step
from tests.support.streaming import LENGTHS, allowed
from tests.support.tiny_models import CAUSAL
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import shifted, worst_difference

SPREAD = {"context_normalize": "mean", "gradient_weight": 4.0}
NAMES = [*CAUSAL, "gpt-oss", "cohere2"]
FEW = ["llama", "mistral-sliding", "gpt2"]
CASES = [*((name, "right", 4) for name in NAMES), *((name, *case) for name in FEW for case in (("left", 5), ("right", 50)))]


def kept_of(taken):
    return taken.kept["decoder"]


def assert_exact(taken, model, batch, limit):
    """Loss and gradients are those of the mean loss of the kept tokens in a plain forward, nothing of which is cut."""
    loss, expected = plain_twin(model, batch, kept_of(taken))
    assert abs(taken.loss - loss) <= limit * loss
    assert worst_difference(taken.gradients, expected) <= limit


# -- stream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, side, chunk", CASES)
def test_stream_is_exact_for_the_loss_of_the_kept_tokens(name, side, chunk):
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    taken = seek_in_stream(model, batch, chunk, **SPREAD)
    assert taken.heard.counts["learned"] < (batch["labels"] != -100).sum() / 2
    assert_exact(taken, model, batch, allowed(name, dtype))
    assert taken.heard.counts["recomputed"] == batch["input_ids"].numel()


CHOSEN_BY = [*(dict(token_scorer=name) for name in ("random", "context", "loss")), dict(select_from="labels"), dict(token_ratio=1.0)]


@pytest.mark.parametrize("settings", CHOSEN_BY, ids=str)
@pytest.mark.parametrize("token_gradient", ["stream", "skip"])
def test_whatever_chose_the_tokens(token_gradient, settings):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    batch["labels"][:, :4] = -100
    taken = seek_in_stream(model, batch, 5, token_gradient=token_gradient, skip_threshold=0.0, **settings)
    assert_exact(taken, model, batch, tolerance(dtype))


@pytest.mark.parametrize("chunk", [4, 50])
def test_a_decoder_streams_under_its_whole_encoder(chunk):
    model, batch, dtype = model_and_batch("bart", lengths=LENGTHS)
    taken = seek_in_stream(model, batch, chunk, token_scorer="context", context_normalize="mean")
    assert set(taken.selection) == {"decoder"}
    assert_exact(taken, model, batch, tolerance(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_cut_is_noticed(name):
    """The sibling: the same tokens, the same loss, and another gradient."""
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    streamed = seek_in_stream(model, batch, 4, **SPREAD)
    cut = take_step(model, batch, **SPREAD)
    assert torch.equal(kept_of(cut), kept_of(streamed)) and abs(cut.loss - streamed.loss) <= allowed(name) * cut.loss
    assert worst_difference(cut.gradients, streamed.gradients) > NOTICED


@pytest.mark.parametrize("scorer", ["random", "combined"])
def test_two_steps_draw_different_tokens(scorer):
    """Replaying the masks of dropout must not bring back the random numbers that tokens were drawn with."""
    model, batch, _ = model_and_batch("llama", lengths=(48, 40), max_position_embeddings=64)
    seeking = seeking_on(model, token_gradient="stream", sequence_chunk_size=8, token_scorer=scorer, token_selection="sample")
    first, second = (kept_of(step_on(model, seeking, batch)) for _ in range(2))
    torch.manual_seed(3)
    third = kept_of(step_on(model, seeking, batch))
    torch.manual_seed(3)
    again = kept_of(step_on(model, seeking, batch))
    seeking.remove()
    assert not torch.equal(first, second)
    assert torch.equal(third, again)


def test_tokens_that_are_drawn_with_replayed_numbers_are_noticed(monkeypatch):
    """The sibling: a tape that goes back to where the first step began."""
    states = []
    monkeypatch.setattr(RandomTape, "record", lambda self, name: states.append(torch.get_rng_state()))
    monkeypatch.setattr(RandomTape, "replay", lambda self, name: torch.set_rng_state(states[0]))
    monkeypatch.setattr(RandomTape, "_go_to", lambda self, state: torch.set_rng_state(states[0]))
    model, batch, _ = model_and_batch("llama", lengths=(48, 40), max_position_embeddings=64)
    seeking = seeking_on(model, token_gradient="stream", sequence_chunk_size=8, token_scorer="random", token_selection="sample")
    first, second = (kept_of(step_on(model, seeking, batch)) for _ in range(2))
    seeking.remove()
    assert torch.equal(first, second)


# -- skip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, side, chunk", CASES)
def test_skip_without_a_threshold_is_exact(name, side, chunk):
    """Only what is owed nothing at all is left out: tokens behind the last kept one of a row, and out of every window."""
    model, batch, dtype = model_and_batch(name, side, lengths=LENGTHS)
    taken = seek_in_stream(model, batch, chunk, token_gradient="skip", skip_threshold=0.0, **SPREAD)
    assert_exact(taken, model, batch, allowed(name, dtype))
    assert taken.heard.counts["recomputed"] <= batch["input_ids"].numel()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_chunk_owes_to_itself_is_not_left_out(monkeypatch, name):
    """The sibling: without later chunks, which alone were to tell, tokens with a loss would run alone."""
    monkeypatch.setattr(SkippingStream, "wanted", lambda self, start, stop: self._learning[:, start:stop])
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    taken = seek_in_stream(model, batch, 50, token_gradient="skip", skip_threshold=0.0, **SPREAD)
    assert taken.heard.counts["recomputed"] == taken.heard.counts["learned"]
    assert worst_difference(taken.gradients, plain_twin(model, batch, kept_of(taken))[1]) > NOTICED


THRESHOLDS = (0.0, 0.03, 0.1, 0.3, 1.0)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_the_higher_the_threshold_the_fewer_tokens_and_the_further_from_exact(name):
    model, batch, _ = model_and_batch(name, lengths=(24, 17))
    taken = [seek_in_stream(model, batch, 2, token_gradient="skip", skip_threshold=t, **SPREAD) for t in THRESHOLDS]
    _, expected = plain_twin(model, batch, kept_of(taken[0]))
    counts = [each.heard.counts["recomputed"] for each in taken]
    errors = [whole_error(each.gradients, expected) for each in taken]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
    assert errors[0] <= tolerance(torch.float64) and errors[1] < errors[-2] and NOTICED < errors[-1] < 1
    assert all(later >= 0.8 * earlier for earlier, later in zip(errors, errors[1:]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_highest_threshold_leaves_the_tokens_with_a_loss(name):
    """One token a chunk, so that no chunk owes anything to itself; chunks of none do not run."""
    model, batch, _ = model_and_batch(name, lengths=LENGTHS)
    taken = seek_in_stream(model, batch, 1, token_gradient="skip", skip_threshold=1.0, **SPREAD)
    assert taken.heard.counts["recomputed"] == taken.heard.counts["learned"]
    assert taken.heard.turns == int((kept_of(taken) & (shifted(batch["labels"]) != -100)).any(0).sum())


@pytest.mark.parametrize("threshold", [0.0, 0.01, 1.0])
def test_chunks_and_rows_without_anything_to_learn_are_skipped(threshold):
    """A long prompt in one row, and a row without labels: ragged chunks, and chunks that never run."""
    model, batch, dtype = model_and_batch("llama", lengths=(24, 17))
    batch["labels"][0, :14], batch["labels"][1] = -100, -100
    settings = dict(select_from="labels", token_gradient="skip", skip_threshold=threshold, **SPREAD)
    taken = seek_in_stream(model, batch, 4, **settings)
    assert taken.heard.counts["recomputed"] < 24
    if threshold == 0:
        assert_exact(taken, model, batch, tolerance(dtype))
    if threshold == 1:
        assert taken.heard.turns < 6
        assert worst_difference(taken.gradients, plain_twin(model, batch, kept_of(taken))[1]) > NOTICED


def test_chunks_behind_the_last_label_are_skipped():
    """They would come first in a stream, which begins with an earlier chunk, and nothing is lost."""
    model, batch, dtype = model_and_batch("llama", lengths=(24, 17))
    batch["labels"][:, 9:] = -100
    taken = seek_in_stream(model, batch, 4, token_gradient="skip", skip_threshold=0.0, select_from="labels")
    assert taken.heard.turns == 2
    assert_exact(taken, model, batch, tolerance(dtype))


@pytest.mark.parametrize("token_gradient", ["stream", "skip"])
def test_a_batch_without_labels_costs_nothing(token_gradient):
    model, batch, _ = model_and_batch("llama", lengths=LENGTHS)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    taken = seek_in_stream(model, batch, 4, token_gradient=token_gradient, **SPREAD)
    assert taken.loss == 0 and taken.gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for g in taken.gradients.values())


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_gradient", ["stream", "skip"])
def test_models_that_cannot_are_refused_by_name(token_gradient):
    settings = TokenSeekingConfig(token_seeking=True, token_gradient=token_gradient)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is bidirectional.*token_gradient"):
        TokenSeeking(model_and_batch("bert")[0], settings)
    with pytest.raises(ConfigError, match="token_gradient: got .*LlamaForSequenceClassification"):
        TokenSeeking(model_and_batch("llama", head="sequence_classification")[0], settings)


# -- sample: an unbiased estimate ------------------------------------------------------------------------------------

DRAWS, STEPS = 100, 64  # copies of one row in a batch, each drawn from by itself; batches


@pytest.fixture(scope="module")
def row():
    """A small model, one row, and the gradient of all its tokens."""
    model, batch, _ = model_and_batch("llama", lengths=(12,), num_hidden_layers=2, hidden_size=16, intermediate_size=24)
    return model, batch, plain_twin(model, batch)[1]


def estimates(row, steps=STEPS, **settings):
    """Mean gradients over DRAWS draws each, (steps, parameters), and the gradient of all tokens, (parameters)."""
    model, batch, expected = row
    copies = {name: value.expand(DRAWS, -1).clone() for name, value in batch.items()}
    seeking = seeking_on(model, sequence_chunk_size=6, **SPREAD | settings)
    torch.manual_seed(1)
    found = [step_on(model, seeking, copies).gradients for _ in range(steps)]
    seeking.remove()
    flat = lambda gradients: torch.cat([gradients[name].flatten() for name in expected])  # noqa: E731
    return torch.stack([flat(each) for each in found]), flat(expected)


def errors_of_means(found, expected):
    """Root mean square relative error of the mean over 1, 4 and 16 batches of draws."""
    means = (found.view(-1, many, found.shape[1]).mean(1) for many in (1, 4, 16))
    return [float((mean - expected).square().sum(1).mean().sqrt() / expected.norm()) for mean in means]


@pytest.mark.parametrize("scorer", ["combined", "random"])
def test_the_mean_gradient_of_samples_converges_to_that_of_all_tokens(row, scorer):
    found, expected = estimates(row, token_gradient="stream", token_selection="sample", token_scorer=scorer)
    few, more, many = errors_of_means(found, expected)
    # four times the draws, half the error; the last is known from 4 means alone
    assert 1.5 < few / more < 2.7 and 1.4 < more / many < 4.5 and many < 0.05
    spread = found.std(0)
    z = ((found.mean(0) - expected) / spread * STEPS**0.5)[spread > tolerance(torch.float64) * expected.abs().max()]
    assert len(z) > len(expected) / 2
    # coordinates depend on each other, so that the bounds are wide
    assert 0.3 < z.square().mean().sqrt() < 2 and z.abs().max() < 6


@pytest.mark.parametrize("token_gradient, token_selection", [("cut", "sample"), ("stream", "top")])
def test_other_estimates_stay_away_from_it_however_many_are_drawn(row, token_gradient, token_selection):
    """The siblings: weights without the gradient through the other tokens, and that gradient without chance and weights."""
    found, expected = estimates(row, steps=16, token_gradient=token_gradient, token_selection=token_selection)
    few, more, many = errors_of_means(found, expected)
    assert many > 0.1 and few / more < 1.4 and more / many < 1.4


def test_samples_without_their_weights_are_biased(row, monkeypatch):
    weight = Choice.weight.fget

    def unweighted(self):
        own = weight(self)
        return torch.where(own > 0, own[own > 0].mean(), 0.0)

    monkeypatch.setattr(Choice, "weight", property(unweighted))
    found, expected = estimates(row, steps=16, token_gradient="stream", token_selection="sample")
    assert errors_of_means(found, expected)[2] > 0.1


@pytest.mark.parametrize("token_gradient", ["stream", "cut"])
def test_a_sample_of_all_tokens_is_plain_training(token_gradient):
    model, batch, dtype = model_and_batch("llama", lengths=LENGTHS)
    settings = dict(token_selection="sample", token_gradient=token_gradient, sequence_chunk_size=5)
    loss, expected = plain_twin(model, batch)
    # all tokens, also where a ratio below 1 was rounded up; their weights are then 1 exactly
    for ratio in (1.0, 0.999):
        taken = take_step(model, batch, token_ratio=ratio, **settings)
        assert abs(taken.loss - loss) <= tolerance(dtype) * loss
        assert worst_difference(taken.gradients, expected) <= tolerance(dtype)
