"""Trainers that people derive, with losses and steps of their own: streamed they train as ever, token seeking changes the gradient alone.

The method comes by the callback, by the mixin above the derived trainer, or by deriving from MemEfficientTrainer.
"""

from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from hf_memtune import (
    ConfigError,
    MemEfficientMixin,
    MemEfficientTrainer,
    MemEfficientTrainingArguments,
    StreamingCallback,
    TokenMapCallback,
    TokenSeekingCallback,
    TokenSeekingConfig,
)
from tests.support.runs import SEEKING, LayerRuns, Run, arguments, exact_model, llama, text_rows, train, trainer_for, worst_step
from tests.support.tiny_models import VOCABULARY
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import ditching, shifted

EXACT = RELATIVE[torch.float64]
ROWS = text_rows(16)
ORDER = {"train_sampling_strategy": "sequential", "max_steps": 2, "logging_steps": 1}
CHUNK = 5
_FOLDER = TemporaryDirectory()


# -- what is derived


class Direct:
    """The usual way to override a loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Doubled:
    """Scales the loss, and adds to it."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs) + 1


class Decayed:
    """Adds a term of its own to the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.01 * sum(p.square().sum() for p in model.parameters())


class Weighted:
    """Some words count for more."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.linspace(0.5, 2, VOCABULARY, dtype=outputs.logits.dtype)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight)
        return (loss, outputs) if return_outputs else loss


class Distilling:
    """Learns what another model says of every token, from the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            said = teacher()(**inputs).logits
        distance = F.kl_div(F.log_softmax(outputs.logits / 2, -1), F.log_softmax(said / 2, -1), reduction="none", log_target=True)
        loss = 4 * distance.sum(-1)[labels != -100].mean()
        return (loss, outputs) if return_outputs else loss


@cache
def teacher():
    return exact_model(seed=7).eval()


class Twice:
    """Two calls of the model make one loss, which goes backward once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        other = {name: value.flip(0) for name, value in inputs.items()}
        first, second = (super(Twice, self).compute_loss(model, each, num_items_in_batch=num_items_in_batch) for each in (inputs, other))
        return first + 0.5 * second.square()


class OwnStep:
    """Goes forward and backward itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = 0.5 * self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class SharpnessAware:
    """Goes backward twice in a step, the second time where the weights are worse."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        self.accelerator.backward(self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))
        moves = [(p, 0.5 * p.grad) for p in model.parameters()]
        self._move(moves, 1)
        model.zero_grad()
        loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        self._move(moves, -1)
        return loss.detach()

    @torch.no_grad()
    def _move(self, moves, sign):
        for parameter, move in moves:
            parameter.add_(move, alpha=sign)


class Embedding:
    """Gives the model embeddings that it has changed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        return model(inputs_embeds=embedded * torch.linspace(1, 2, embedded.shape[1])[:, None], **inputs).loss


class InPlaces:
    """Gives arguments by their place, and asks for a tuple."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, *_ = model(inputs["input_ids"], None, inputs["attention_mask"], return_dict=False)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class Thawing:
    """Trains the first layer in the second step alone."""

    def training_step(self, model, *args, **kwargs):
        for parameter in model.transformer.h[0].parameters():
            parameter.requires_grad_(self.state.global_step == 1)
        return super().training_step(model, *args, **kwargs)


def by_position(outputs, labels, num_items_in_batch=None):
    """Later tokens count for more."""
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), shifted(labels), reduction="none")
    return (losses * torch.arange(labels.shape[1])).sum() / num_items_in_batch


@dataclass(frozen=True)
class Case:
    """allowed: of gradients; transformers takes its own loss in float32."""

    derived: type = object
    loss: object = None
    allowed: float = FLOAT32_INSIDE

    def trainer(self, base: type) -> type:
        return type(f"{self.derived.__name__}{base.__name__}", (self.derived, base) if self.derived is not object else (base,), {})


CASES = {
    "direct": Case(Direct),
    "doubled": Case(Doubled),
    "decayed": Case(Decayed),
    "weighted": Case(Weighted, allowed=EXACT),
    "distilling": Case(Distilling, allowed=EXACT),
    "twice": Case(Twice),
    "own step": Case(OwnStep),
    "by position": Case(loss=by_position, allowed=EXACT),
}
ODD = {
    "sharpness aware": Case(SharpnessAware),
    "embeddings given": Case(Embedding),
    "in places": Case(InPlaces, allowed=EXACT),
    "thawing": Case(Thawing),
}
OF_LOGITS = ["weighted", "distilling", "by position"]  # losses that are not the model's own
HOWS = ["callback", "mixin above", "mixin below"]


def run(name, how="plain", cls=None, model=None, callback=None, settings=None, rows=ROWS, **more) -> Run:
    """A run of a case. callback: what brings the method alone, and settings: what does in arguments."""
    case = (CASES | ODD)[name]
    base = MemEfficientTrainer if how == "mixin below" else Trainer
    cls = cls or case.trainer(base)
    cls = type(f"Above{cls.__name__}", (MemEfficientMixin, cls), {}) if how == "mixin above" else cls
    is_ours = how.startswith("mixin")
    args_class = {"cls": MemEfficientTrainingArguments, **settings} if is_ours else {}
    layers = LayerRuns()
    callbacks = [layers, callback] if how == "callback" else [layers]
    args = arguments(_FOLDER.name, False, **ORDER | args_class | more)
    found = train(model or exact_model(), args, rows, cls, compute_loss_func=case.loss, callbacks=callbacks)
    found.layers = layers
    return found


@cache
def plain(name, accumulation=1) -> Run:
    return run(name, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)


@cache
def streamed(name, how, accumulation=1) -> Run:
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    streaming = {"sequence_chunk_size": CHUNK}
    return run(name, how, callback=StreamingCallback(**streaming), settings=streaming, **sizes)


def seeking(name, how, cls=None, rows=ROWS, **more) -> Run:
    settings = SEEKING | more
    return run(name, how, cls, callback=TokenSeekingCallback(TokenSeekingConfig(**settings)), settings=settings, rows=rows)


# -- streaming


@pytest.mark.parametrize("how, accumulation", [*((how, 1) for how in HOWS), ("mixin above", 2)])
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_without_streaming(name, how, accumulation):
    ours, theirs = streamed(name, how, accumulation), plain(name, accumulation)
    assert worst_step(ours, theirs) <= CASES[name].allowed
    assert ours.losses == pytest.approx(theirs.losses, rel=FLOAT32_INSIDE)
    for parameter, p in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[parameter], p, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("how", ["callback", "mixin above"])
@pytest.mark.parametrize("name", ODD)
def test_odd_steps_train_as_without_streaming(name, how):
    ours, theirs = streamed(name, how), plain(name)
    assert worst_step(ours, theirs) <= ODD[name].allowed
    assert ours.losses == pytest.approx(theirs.losses, rel=FLOAT32_INSIDE)
    assert ours.layers.widest <= CHUNK < theirs.layers.widest
    assert worst_step(ours, plain("direct")) > NOTICED or name == "in places"  # by the same loss


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", CASES)
def test_it_streams(name, how):
    """Layers run on chunks: more often, and on fewer tokens at once."""
    ours, theirs = streamed(name, how).layers, plain(name).layers
    assert ours.widest <= CHUNK < theirs.widest
    assert ours.with_gradient > theirs.with_gradient and ours.without > theirs.without == 0


@pytest.mark.parametrize("name", CASES)
def test_another_loss_is_noticed(name):
    """Sibling: each of them is a loss of its own, and the comparisons see it."""
    for other in CASES:
        assert name == other or worst_step(plain(name), plain(other)) > NOTICED


# -- outputs that a subclass looks at


class Looking:
    """Keeps the logits of the last call of the model in training."""

    seen = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.seen = outputs.logits.detach().clone() + 0
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("method", ["streaming", "seeking", "seeking in a stream"])
@pytest.mark.parametrize("how", HOWS)
def test_a_subclass_is_given_the_logits_of_all_tokens(how, method):
    settings = {"streaming": {"sequence_chunk_size": CHUNK}, "seeking": SEEKING}.get(method)
    settings = settings or SEEKING | {"token_gradient": "stream", "sequence_chunk_size": CHUNK}
    callback = StreamingCallback(**settings) if method == "streaming" else TokenSeekingCallback(**settings)
    cls = type("LookingTrainer", (Looking, MemEfficientTrainer if how == "mixin below" else Trainer), {})
    ours = run("direct", how, cls, callback=callback, settings=settings, learning_rate=0.0).trainer.seen
    theirs = run("direct", cls=type("LookingPlain", (Looking, Trainer), {}), learning_rate=0.0).trainer.seen
    assert ours.shape == theirs.shape and ours.shape[1] > 2 * CHUNK
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    other = run("direct", cls=type("LookingPlain", (Looking, Trainer), {}), learning_rate=0.0, model=exact_model(seed=1)).trainer.seen
    assert (ours - other).abs().max() > NOTICED


# -- token seeking


class Remembering:
    """Keeps which tokens each call of the model in training kept."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.chosen = [*getattr(self, "chosen", []), self.method_callback.last_selection]
        return loss


class Twin:
    """A full run in which everything of the other tokens is detached."""

    chosen: list

    @property
    def kept(self):
        return self.chosen[self.state.global_step].kept_mask()

    def compute_loss(self, *args, **kwargs):
        with ditching(self.model, {"decoder": self.kept}):
            return super().compute_loss(*args, **kwargs)


class TwinOfSample(Twin):
    """The same, where the gradient of each kept token counts for more, by one over the probability with which it was drawn."""

    def compute_loss(self, *args, **kwargs):
        chosen = self.chosen[self.state.global_step]
        weight = torch.ones(self.kept.shape).scatter(1, chosen.index, chosen.weight).double()[..., None]

        def weigh(module, args, output):
            hidden = output.last_hidden_state
            output.last_hidden_state = weight * hidden - ((weight - 1) * hidden).detach()
            return output

        hook = self.model.transformer.register_forward_hook(weigh)
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            hook.remove()


class TwinOfLabels(Twin):
    """The same for the model's own loss, which is the mean over kept tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicted = F.pad(self.kept[:, :-1], (1, 0))  # a label is that of the token before
        inputs["labels"] = inputs["labels"].masked_fill(~predicted, -100)
        return super().compute_loss(model, inputs, return_outputs, (inputs["labels"] != -100).sum())


def remembering(name) -> type:
    return type("RememberingTrainer", (Remembering, CASES[name].trainer(Trainer)), {})


def twin_of(name, ours: Run, kind: type, **kwargs) -> Run:
    return run(name, cls=type("TwinTrainer", (kind, CASES[name].trainer(Trainer)), {"chosen": ours.trainer.chosen}), **kwargs)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_loss_of_logits_is_that_of_all_tokens_and_its_gradient_that_of_the_kept(name):
    ours = seeking(name, "mixin above", remembering(name))
    assert ours.losses[0] == pytest.approx(plain(name).losses[0], rel=FLOAT32_INSIDE)
    assert worst_step(ours, twin_of(name, ours, Twin)) <= EXACT
    assert worst_step(ours, plain(name)) > NOTICED


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_sample_weighs_the_gradient_of_any_loss(name):
    ours = seeking(name, "mixin above", remembering(name), token_selection="sample", select_from="labels")
    assert ours.losses[0] == pytest.approx(plain(name).losses[0], rel=FLOAT32_INSIDE)
    assert worst_step(ours, twin_of(name, ours, TwinOfSample)) <= EXACT
    assert worst_step(ours, twin_of(name, ours, Twin)) > NOTICED


@pytest.mark.parametrize("name", ["direct", "doubled", "decayed", "own step"])
def test_the_models_own_loss_is_the_mean_of_the_kept_tokens(name):
    # GPT-2 counts the label of a row's first token, which nothing predicts
    rows = [row | {"labels": [-100, *row["labels"][1:]]} for row in ROWS]
    ours = seeking(name, "mixin above", remembering(name), rows)
    theirs = twin_of(name, ours, TwinOfLabels, rows=rows)
    assert worst_step(ours, theirs) <= FLOAT32_INSIDE
    assert ours.losses == pytest.approx(theirs.losses, rel=FLOAT32_INSIDE)
    assert worst_step(ours, run(name, rows=rows)) > NOTICED


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_turn_it_on_seeks_alike(name):
    same, *others = (seeking(name, how) for how in HOWS)
    assert all(worst_step(ours, same) == 0.0 and ours.losses == same.losses for ours in others)
    assert worst_step(same, plain(name)) > NOTICED


@pytest.mark.parametrize("name, how", [*((name, "mixin above") for name in CASES), ("direct", "callback"), ("twice", "mixin below")])
def test_all_tokens_learn_what_they_learn_without(name, how):
    """In a stream, since plain training is what all tokens get otherwise."""
    ours = seeking(name, how, token_ratio=1.0, token_gradient="stream", sequence_chunk_size=CHUNK)
    assert worst_step(ours, plain(name)) <= CASES[name].allowed
    assert ours.losses == pytest.approx(plain(name).losses, rel=FLOAT32_INSIDE)
    assert ours.layers.widest <= CHUNK


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_a_subclass_adds_to_the_loss_is_reported(tmp_path, accumulation):
    settings = {**ORDER, "learning_rate": 0.0, "gradient_accumulation_steps": accumulation}
    found = train(llama(), arguments(tmp_path / "a", **settings), ROWS).losses
    doubled = train(llama(), arguments(tmp_path / "b", **settings), ROWS, cls=CASES["doubled"].trainer(MemEfficientTrainer)).losses
    assert doubled == pytest.approx([2 * loss + accumulation for loss in found], rel=1e-5)


# -- what cannot be


def test_a_name_is_not_a_scorer_function(tmp_path):
    with pytest.raises(ConfigError, match="Names go to args.token_scorer"):
        trainer_for(llama(), arguments(tmp_path), ROWS, token_scorer="random")


def test_impossible_drawings_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="expected 1 or more"):
        TokenMapCallback([], None, arguments(tmp_path), every_n_steps=0)
