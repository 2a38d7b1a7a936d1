"""Gradient accumulation changes how a batch is cut, not what is learned from it.

Invariant: with k micro-batches the gradient and the logged loss are those of one batch, a mean over all kept, labelled tokens.
"""

import pytest
import torch

from hf_memtune.training import normalizer
from tests.tolerances import NOTICED, RELATIVE
from tests.training.runs import arguments, exact_model, llama, text_rows, train, worst_step

EXACT = RELATIVE[torch.float64]
LOGGED = 1e-6  # transformers adds up the logged losses in float32
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def run(tmp_path, rows, batch, accumulation, model=None, **settings):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return train(model or exact_model(), arguments(tmp_path, **sizes, **settings), rows)


def unlabelled(row: dict) -> dict:
    return row | {"labels": [-100] * len(row["labels"])}


@pytest.mark.parametrize("settings", [{}, {"select_from": "labels"}, {"token_scorer": "loss"}, {"label_smoothing_factor": 0.1}])
@pytest.mark.parametrize("batch, accumulation", CUTS[1:])
def test_every_cut_of_a_batch_gives_the_same_gradients(tmp_path, batch, accumulation, settings):
    rows = text_rows()
    whole = run(tmp_path, rows, 8, 1, **settings)
    cut = run(tmp_path, rows, batch, accumulation, **settings)
    assert worst_step(cut, whole) <= EXACT
    assert cut.losses == pytest.approx(whole.losses, rel=LOGGED)


def test_micro_batches_really_differ_in_kept_labels(tmp_path, monkeypatch):
    counts = []
    add = normalizer.RunningMean.add_tokens
    monkeypatch.setattr(
        normalizer.RunningMean, "add_tokens", lambda self, n, *rest: counts.append(int(n)) or add(self, n, *rest)
    )
    run(tmp_path, text_rows(), 2, 4)
    assert len(set(counts[:4])) > 1


def test_a_mean_of_means_is_noticed(tmp_path, monkeypatch):
    """The usual mistake: every micro-batch divided by its own count, and the results averaged."""
    rows = text_rows()
    whole = run(tmp_path, rows, 8, 1)

    def own_mean(self, count, parameters):
        self.tokens = count * 4  # four micro-batches
        return self.tokens.clamp_min(1)

    monkeypatch.setattr(normalizer.RunningMean, "add_tokens", own_mean)
    assert worst_step(run(tmp_path, rows, 2, 4), whole) > NOTICED


@pytest.mark.parametrize("where", [slice(0, 2), slice(6, 8)], ids=["first", "last"])
def test_a_micro_batch_without_labels_weighs_nothing(tmp_path, where):
    rows = text_rows(8)
    rows[where] = [unlabelled(row) for row in rows[where]]
    order = {"train_sampling_strategy": "sequential", "max_steps": 1}
    whole, cut = run(tmp_path, rows, 8, 1, **order), run(tmp_path, rows, 2, 4, **order)
    assert worst_step(cut, whole) <= EXACT
    assert cut.losses == pytest.approx(whole.losses, rel=LOGGED)


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_any_label_costs_nothing(tmp_path, batch, accumulation, dtype):
    rows = [unlabelled(row) for row in text_rows(8)]
    finished = run(tmp_path, rows, batch, accumulation, model=llama(dtype), max_steps=1)
    assert finished.losses == [0.0]
    assert all(not gradient.any() for gradient in finished.gradients[0].values())
    assert all(parameter.isfinite().all() for parameter in finished.parameters.values())


def test_clipping_sees_the_gradient_of_the_whole_accumulation(tmp_path):
    rows = text_rows()
    whole, cut = (run(tmp_path, rows, *how, max_grad_norm=0.01, max_steps=1) for how in [(8, 1), (2, 4)])
    norm = torch.stack([gradient.norm() for gradient in cut.gradients[0].values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-4)
    assert worst_step(cut, whole) <= EXACT
    logged = [r.trainer.state.log_history[0]["grad_norm"] for r in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], rel=LOGGED) and logged[0] > 0.01


def test_a_shorter_last_accumulation_is_its_own_mean(tmp_path):
    """12 rows in micro-batches of 2, four at a time: the second step has two of them."""
    rows, order = text_rows(12), {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "max_steps": -1}
    whole, cut = run(tmp_path, rows, 8, 1, **order), run(tmp_path, rows, 2, 4, **order)
    assert len(cut.losses) == 2
    assert worst_step(cut, whole) <= EXACT


def test_row_tasks_accumulate_as_in_transformers(tmp_path):
    """With one loss for a row the Trainer's own rule applies: nothing of ours scales it."""
    from transformers import Trainer

    from tests.methods.tiny_models import tiny_model

    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(text_rows(8))]
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    ours = train(
        tiny_model("gpt2", "sequence_classification"), arguments(tmp_path, token_ratio=1.0, **cut), rows
    )
    plain = train(tiny_model("gpt2", "sequence_classification"), arguments(tmp_path, seeking=False, **cut), rows, cls=Trainer)
    assert worst_step(ours, plain) <= EXACT
    assert ours.losses == pytest.approx(plain.losses, rel=LOGGED)


def test_half_precision_gradients_are_rescaled_by_a_wide_factor():
    """bfloat16 has 8 bits: as bfloat16, a count of 513 would be 512, and every earlier gradient would be off by it."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    parameter.grad = torch.full((1,), 1024.0, dtype=torch.bfloat16)
    mean = normalizer.RunningMean()
    mean.add_tokens(torch.tensor(513), [parameter])
    mean.add_tokens(torch.tensor(513), [parameter])
    assert parameter.grad.item() == 512.0
