"""Gradient accumulation under token seeking. How calls of the model add up is transformers' to say; what a call gives is the method's.

token_selection=top: a call's loss is the mean over its kept, labelled tokens, and calls weigh by their labels, as in plain training:

    dL/dtheta = sum_c (labels of c / labels of all calls) * d(mean loss of the kept tokens of c)/dtheta.

So a cut of a batch learns what the whole learns where each call keeps the same share of its labels, and nearly that otherwise.
token_selection=sample: every cut of a batch gives the same gradients, where the same tokens are drawn.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from hf_memtune import MemEfficientTrainer
from tests.support.accumulation import LOGGED
from tests.support.runs import arguments, exact_model, llama, text_rows, train, worst_step
from tests.support.stepping import Ear
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import gradients, shifted, twin_loss, worst_difference

EXACT = RELATIVE[torch.float64]
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
ORDER = {"train_sampling_strategy": "sequential"}
SAMPLE = {"token_selection": "sample"}
ONE_SHAPE = [row | {"labels": [-100] * 4 + row["input_ids"][4:]} for row in text_rows(shortest=12, longest=12)]


def cross_entropy(outputs, labels, num_items_in_batch=None):
    """What transformers takes in float32, in the dtype of the logits."""
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, target, reduction="sum") / num_items_in_batch


def run(tmp_path, rows, batch, accumulation, model=None, cls=MemEfficientTrainer, loss=cross_entropy, **settings):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return train(model or exact_model(), arguments(tmp_path, **sizes, **settings), rows, cls, compute_loss_func=loss)


def unlabelled(row: dict) -> dict:
    return row | {"labels": [-100] * len(row["labels"])}


class Remembering(MemEfficientTrainer):
    """Keeps the batches of the first step, and which of their tokens were kept."""

    def training_step(self, model, inputs, *args):
        batch = dict(inputs)
        loss = super().training_step(model, inputs, *args)
        if self.state.global_step == 0:
            self.calls = [*getattr(self, "calls", []), (batch, {"decoder": self.last_selection.kept_mask()})]
        return loss


def labels_of(batch) -> int:
    return int((shifted(batch["labels"]) != -100).sum())


def expected_step(calls, share) -> tuple[float, dict]:
    """The loss and the gradients of the first step. share: of a call's mean, of its batch and its kept tokens."""
    model = exact_model()
    loss = sum(share(batch, kept) * twin_loss(model, batch, kept, causal_lm=True) for batch, kept in calls)
    return float(loss), gradients(model, loss)


# -- the best tokens


OTHERWISE_CHOSEN = [{"select_from": "labels"}, {"token_scorer": "loss", "context_normalize": None}]


@pytest.mark.parametrize("cut, settings", [*((cut, {}) for cut in CUTS), *(((2, 4), settings) for settings in OTHERWISE_CHOSEN)])
@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["own function", "of the model"])
def test_calls_weigh_by_their_labels_and_learn_the_mean_of_their_kept_tokens(tmp_path, cut, loss, settings):
    batch, accumulation = cut
    found = run(tmp_path, text_rows(), batch, accumulation, cls=Remembering, loss=loss, max_steps=1, **settings)
    calls = found.trainer.calls
    assert len(calls) == accumulation
    count = sum(int((batch["labels"] != -100).sum()) for batch, _ in calls)  # transformers counts GPT-2's first labels, too
    mean, wanted = expected_step(calls, lambda batch, kept: labels_of(batch) / count)
    assert worst_difference(found.gradients[0], wanted) <= (EXACT if loss else FLOAT32_INSIDE)
    assert found.losses[0] == pytest.approx(mean, rel=LOGGED)


def test_calls_that_weigh_otherwise_are_noticed(tmp_path):
    """Sibling: neither a mean of means nor one mean over all kept tokens, of which the latter is what the whole batch learns."""
    found = run(tmp_path, text_rows(), 2, 4, cls=Remembering)
    calls = found.trainer.calls

    def learned(batch, kept):
        return int(((shifted(batch["labels"]) != -100) & kept["decoder"]).sum())

    kept_labels = sum(learned(*call) for call in calls)
    _, of_means = expected_step(calls, lambda batch, kept: 1 / len(calls))
    _, of_kept = expected_step(calls, lambda batch, kept: learned(batch, kept) / kept_labels)
    assert worst_difference(found.gradients[0], of_means) > NOTICED
    assert worst_difference(found.gradients[0], of_kept) > NOTICED
    assert worst_step(found, run(tmp_path, text_rows(), 8, 1)) > NOTICED


@pytest.mark.parametrize("batch, accumulation", CUTS[1:])
def test_where_calls_keep_the_same_share_every_cut_gives_the_same_gradients(tmp_path, batch, accumulation):
    settings = {"select_from": "labels"}
    whole, cut = (run(tmp_path, ONE_SHAPE, *how, **settings) for how in [(8, 1), (batch, accumulation)])
    assert worst_step(cut, whole) <= EXACT
    assert cut.losses == pytest.approx(whole.losses, rel=LOGGED)


def test_micro_batches_really_differ_in_kept_labels(tmp_path):
    ear, counts = Ear(), []
    ear.counted = lambda **found: counts.append(int(found["learned"])) if "learned" in found else None

    class Heard(MemEfficientTrainer):
        def train(self, **kwargs):
            self.method_callback.listeners.append(ear)
            return super().train(**kwargs)

    run(tmp_path, text_rows(), 2, 4, cls=Heard)
    assert len(counts) == 8 and len(set(counts[:4])) > 1


# -- a sample

SAMPLED = [
    {},
    {"token_scorer": "random", "context_normalize": None},
    {"token_scorer": "loss", "context_normalize": None},
    {"select_from": "labels", "token_scorer": "context"},
    {"token_gradient": "stream", "sequence_chunk_size": 5},
]


@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize("batch, accumulation", CUTS[1:])
def test_every_cut_of_a_batch_gives_the_same_gradients(tmp_path, batch, accumulation, settings):
    """One number is drawn for each row, from torch's generator: the same, however rows are cut."""
    whole, cut = (run(tmp_path, text_rows(), *how, **ORDER, **SAMPLE, **settings) for how in [(8, 1), (batch, accumulation)])
    assert worst_step(cut, whole) <= EXACT
    assert cut.losses == pytest.approx(whole.losses, rel=LOGGED)


@pytest.mark.parametrize("settings", [{"loss": None}, {"loss": None, "label_smoothing_factor": 0.1}], ids=["of the model", "smoothed"])
def test_every_cut_gives_the_same_gradients_of_transformers_own_losses(tmp_path, settings):
    whole, cut = (run(tmp_path, text_rows(), *how, **ORDER, **SAMPLE, **settings) for how in [(8, 1), (2, 4)])
    assert worst_step(cut, whole) <= FLOAT32_INSIDE
    assert cut.losses == pytest.approx(whole.losses, rel=LOGGED)


def test_other_draws_are_noticed(tmp_path):
    settings = ORDER | SAMPLE | {"data_seed": 42}
    assert worst_step(run(tmp_path, text_rows(), 2, 4, seed=8, **settings), run(tmp_path, text_rows(), 8, 1, **settings)) > NOTICED


def test_a_mean_of_means_is_noticed(tmp_path):
    """The usual mistake: every micro-batch divided by its own count, and the results averaged."""

    def own_mean(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs, labels, 4 * (labels[:, 1:] != -100).sum().clamp_min(1))

    whole, cut = run(tmp_path, text_rows(), 8, 1, **ORDER, **SAMPLE), run(tmp_path, text_rows(), 2, 4, loss=own_mean, **ORDER, **SAMPLE)
    assert worst_step(cut, whole) > NOTICED


# -- micro-batches without labels


@pytest.mark.parametrize("where, selection", [("first", {}), ("last", {}), ("last", SAMPLE)], ids=["first", "last", "last of a sample"])
def test_a_micro_batch_without_labels_weighs_nothing(tmp_path, where, selection):
    """The same as without its rows."""
    labelled = [row for row in text_rows(12) if row["labels"][-1] != -100][:6]
    others = [unlabelled(row) for row in text_rows(2, seed=9)]
    rows = [*others, *labelled] if where == "first" else [*labelled, *others]
    fixed = {**ORDER, **selection, "max_steps": 1}
    with_them, without = run(tmp_path, rows, 2, 4, **fixed), run(tmp_path, labelled, 2, 3, **fixed)
    assert len(with_them.gradients) == 1 and worst_step(with_them, without) <= EXACT
    assert with_them.losses == pytest.approx(without.losses, rel=LOGGED)


@pytest.mark.parametrize("settings", [{}, SAMPLE, {"token_gradient": "stream", "sequence_chunk_size": 5}], ids=["top", "sample", "stream"])
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_any_label_costs_nothing(tmp_path, batch, accumulation, dtype, settings):
    """Its loss is 0 / 0, in transformers too, which logs it as it is if asked to; nothing is learned from it."""
    rows = [unlabelled(row) for row in text_rows(8)]
    fixed = {"max_steps": 1, "logging_nan_inf_filter": False}
    finished = run(tmp_path, rows, batch, accumulation, model=llama(dtype), loss=None, **fixed, **settings)
    fixed |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    plain = train(llama(dtype), arguments(tmp_path, False, **fixed), rows, Trainer)
    assert math.isnan(plain.losses[0]) and math.isnan(finished.losses[0])
    assert all(not gradient.any() for gradient in finished.gradients[0].values())
    assert all(torch.equal(p, finished.parameters[name]) for name, p in llama(dtype).named_parameters())


# -- around the steps


def test_clipping_sees_the_gradient_of_the_whole_accumulation(tmp_path):
    rows, fixed = text_rows(), ORDER | SAMPLE | {"max_grad_norm": 0.01, "max_steps": 1}
    whole, cut = (run(tmp_path, rows, *how, **fixed) for how in [(8, 1), (2, 4)])
    norm = torch.stack([gradient.norm() for gradient in cut.gradients[0].values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-4)
    assert worst_step(cut, whole) <= EXACT
    logged = [r.trainer.state.log_history[0]["grad_norm"] for r in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], rel=LOGGED) and logged[0] > 0.01


def test_a_shorter_last_accumulation_is_its_own_mean(tmp_path):
    """12 rows in micro-batches of 2, four at a time: the second step has two of them."""
    rows, fixed = text_rows(12), ORDER | SAMPLE | {"num_train_epochs": 1, "max_steps": -1}
    whole, cut = run(tmp_path, rows, 8, 1, **fixed), run(tmp_path, rows, 2, 4, **fixed)
    assert len(cut.losses) == 2
    assert worst_step(cut, whole) <= EXACT


def test_row_tasks_accumulate_as_in_transformers(tmp_path):
    """With one loss for a row the Trainer's own rule applies: nothing of ours scales it."""
    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(text_rows(8))]
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours = train(tiny_model("gpt2", "sequence_classification"), arguments(tmp_path, token_ratio=1.0, **cut), rows)
    plain = train(tiny_model("gpt2", "sequence_classification"), arguments(tmp_path, seeking=False, **cut), rows, cls=Trainer)
    assert worst_step(ours, plain) <= EXACT
    assert ours.losses == pytest.approx(plain.losses, rel=LOGGED)
