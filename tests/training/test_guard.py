"""The guard of token seeking: it speaks when the loss of all tokens rises while that of the kept ones falls, and only then."""

import random
from itertools import repeat

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_memtune.core.head_call import HeadCall
from hf_memtune.training.guard import IN_A_ROW, WINDOW, FullLossGuard, first_batches, full_loss, rose, rows_of
from hf_memtune.training.loss_alone import on_demand
from tests.support.runs import DrawingRows, arguments, llama, pad_right, same_parameters, text_rows, train, trainer_for
from tests.support.tiny_models import batch_for, tiny_model
from tests.support.tolerances import FLOAT32_INSIDE

EXACT = FLOAT32_INSIDE  # transformers takes the loss of language models in float32
CPU = torch.device("cpu")


# -- when it warns -----------------------------------------------------------------------------------------------------


def warnings_of(kept, full) -> list[int]:
    """The logs at which it warned."""
    guard = FullLossGuard()
    return [number for number, losses in enumerate(zip(kept, full)) if guard.add(*losses)]


def line(start: float, slope: float, noise: float = 0.0, count: int = 30, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [start + slope * n + draw.gauss(0, noise) for n in range(count)]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_it_warns_when_all_tokens_get_worse_while_the_kept_get_better(noise):
    found = warnings_of(line(2, -0.02, noise, seed=1), line(2, 0.02, noise, seed=2))
    assert found[0] >= 2 * WINDOW + IN_A_ROW - 2  # never before both windows are full
    assert found[0] < 3 * WINDOW


@pytest.mark.parametrize(
    "kept, full",
    [(-0.02, -0.02), (0.02, 0.02), (0.02, -0.02), (-0.02, 0.0), (0.0, 0.02)],
    ids=["both fall", "both rise", "only the kept rise", "all stay", "the kept stay"],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_it_is_silent_otherwise(kept, full, noise):
    assert not warnings_of(line(2, kept, noise, seed=1), line(2, full, noise, seed=2))


def warned_share(kept: float, full: float, runs: int = 100) -> float:
    """Share of runs of a hundred logs, noise in both losses, in which it warned."""
    found = [warnings_of(line(2, kept, 0.1, 100, seed), line(2, full, 0.02, 100, seed + runs)) for seed in range(runs)]
    return sum(map(bool, found)) / runs


def test_noise_alone_is_not_a_warning():
    assert warned_share(0.0, 0.0) <= 0.05
    assert warned_share(-0.05, 0.02) >= 0.95  # sibling: in the same noise, what it is for


def test_a_single_step_up_is_one_warning():
    full = [2.0] * 10 + [2.1] * 30
    assert len(warnings_of(line(2, -0.02, count=40), full)) == 1


def test_the_warning_says_how_much_and_what_to_do():
    guard = FullLossGuard()
    message, *_ = [found for losses in zip(line(2, -0.02), line(2, 0.1)) if (found := guard.add(*losses))]
    assert "from 2.3000 to 2.8000" in message and "token_ratio" in message


def test_losses_that_are_not_numbers_are_no_rise():
    assert not warnings_of(line(2, -0.02), repeat(float("nan")))
    assert not rose([1.0] * (2 * WINDOW - 1))
    assert rose([1.0] * WINDOW + [2.0] * WINDOW) and not rose([2.0] * WINDOW + [1.0] * WINDOW)


# -- the loss of all tokens --------------------------------------------------------------------------------------------

HEADS = [
    ("llama", "causal_lm"), ("gpt2", "causal_lm"), ("bert", "masked_lm"), ("bart", "seq2seq"), ("bert", "token_classification"),
    ("llama", "sequence_classification"), ("bert", "question_answering"),
]  # fmt: skip


def whole(model, batch) -> float:
    with torch.no_grad():
        return model(**batch).loss.item()


def evaluated(name, head=None, **settings):
    classes = {"num_labels": 2} if head == "question_answering" else {}  # a start and an end
    model = tiny_model(name, head, **classes, **settings).eval()
    return model, batch_for(model, head)


@pytest.mark.parametrize("name, head", HEADS)
def test_it_is_the_mean_of_a_plain_forward_however_the_rows_are_cut(name, head):
    model, batch = evaluated(name, head)
    expected = pytest.approx(whole(model, batch), rel=EXACT)
    assert full_loss(model, [batch]) == expected
    assert full_loss(model, rows_of(batch, 2)) == expected
    assert full_loss(model, rows_of(batch, 1)) != expected


def test_rows_count_by_their_labels():
    """Sibling: a mean of the rows' means is something else."""
    model, batch = evaluated("llama")
    rows = rows_of(batch, 2)
    assert full_loss(model, rows) != pytest.approx(sum(whole(model, row) for row in rows) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_loss_of_tokens_needs_no_logits(name, monkeypatch):
    model, batch = evaluated(name)
    expected = pytest.approx(whole(model, batch), rel=EXACT)
    monkeypatch.setattr(HeadCall, "logits", lambda *args: pytest.fail("logits were made"))
    assert full_loss(model, [batch]) == expected
    head = model.get_output_embeddings()
    with pytest.raises(pytest.fail.Exception):
        on_demand(head, torch.zeros(1, 1, head.in_features, dtype=torch.float64)).sum()


def test_it_counts_nothing_where_nothing_is_labelled():
    model, batch = evaluated("llama")
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert np.isnan(full_loss(model, [unlabelled])) and np.isnan(full_loss(model, []))
    assert full_loss(model, [unlabelled, batch]) == full_loss(model, [batch])


def test_model_and_random_numbers_are_left_as_they_were():
    model, batch = evaluated("bert", attention_probs_dropout_prob=0.5)
    model.train().bert.embeddings.eval()
    modes, weights = [m.training for m in model.modules()], {name: p.clone() for name, p in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    first = full_loss(model, [batch])
    assert first == full_loss(model, [batch])  # no dropout
    assert whole(model, batch) != first  # sibling: this is training mode
    torch.set_rng_state(states[0])
    full_loss(model, [batch])
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- the rows it is taken on -------------------------------------------------------------------------------------------

ROWS = text_rows(5)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


@pytest.mark.parametrize("dataset", [ROWS, {"first": ROWS, "second": ROWS[3:]}, Stream()], ids=["rows", "several", "a stream"])
def test_the_first_rows_are_taken_one_a_batch(dataset):
    found = first_batches(dataset, 3, pad_right, CPU)
    assert [batch["input_ids"].tolist() for batch in found] == [[row["input_ids"]] for row in ROWS[:3]]
    assert len(first_batches(dataset, 9, pad_right, CPU)) == 5


def test_a_collator_that_draws_takes_nothing_from_training():
    def drawing(rows):
        return pad_right(rows) | {"drawn": torch.rand(1)}

    state = torch.get_rng_state()
    assert len(first_batches(ROWS, 2, drawing, CPU)) == 2 and torch.equal(torch.get_rng_state(), state)
    drawing(ROWS[:1])
    assert not torch.equal(torch.get_rng_state(), state)


def test_rows_that_draw_take_nothing_from_training():
    rows, untouched = DrawingRows(ROWS), DrawingRows(ROWS)
    first_batches(rows, 2, pad_right, CPU)
    assert rows.next_draw == untouched.next_draw
    assert rows[0] and rows.next_draw != untouched.next_draw


def test_rows_of_a_batch_keep_what_they_share():
    batch = pad_right(ROWS) | {"position_ids": torch.arange(16)[None], "name": "text"}
    first, second = rows_of(batch, 2)
    assert first["input_ids"].shape == second["input_ids"].shape == (1, batch["input_ids"].shape[1])
    assert torch.equal(second["labels"], batch["labels"][1:2]) and second["name"] == "text"
    assert second["position_ids"] is batch["position_ids"]
    packed = pad_right(ROWS[:1]) | {"cu_seq_lens_q": torch.tensor([0, 2, 5])}
    assert rows_of(packed, 2) == [packed] and rows_of(packed, 0) == []
    assert len(rows_of(batch, 99)) == 5


# -- in a training -----------------------------------------------------------------------------------------------------


def full_losses(run) -> list[float]:
    return [entry["full_loss"] for entry in run.trainer.state.log_history if "full_loss" in entry]


@pytest.mark.parametrize("held_out", [True, False], ids=["evaluation set", "last batch"])
def test_it_is_logged_and_changes_nothing_of_the_run(tmp_path, held_out):
    data = {"eval_dataset": text_rows(12, seed=5)} if held_out else {}
    settings = {"token_scorer": "random", "max_steps": 3}  # draws at every step
    watched = train(llama(attention_dropout=0.2), arguments(tmp_path, **settings), text_rows(24), **data)
    alone = train(llama(attention_dropout=0.2), arguments(tmp_path, full_loss_rows=0, **settings), text_rows(24), **data)
    assert len(full_losses(watched)) == 3 and not full_losses(alone)
    assert same_parameters(watched, alone) and watched.losses == alone.losses


def test_it_is_the_evaluation_loss_of_its_rows(tmp_path):
    held_out = text_rows(12, seed=5)
    run = train(llama(), arguments(tmp_path, full_loss_rows=12), text_rows(24), eval_dataset=held_out)
    expected = [full_loss(run.trainer.model, first_batches(held_out, n, pad_right, CPU)) for n in (12, 6)]
    assert full_losses(run)[-1] == pytest.approx(expected[0], rel=EXACT) != pytest.approx(expected[1], rel=1e-4)


def test_a_second_training_is_watched_on_its_own_rows(tmp_path):
    held_out = [text_rows(8, seed=seed) for seed in (5, 6)]
    trainer = trainer_for(llama(), arguments(tmp_path), text_rows(24), eval_dataset=held_out[0])
    for rows in held_out:
        trainer.eval_dataset = rows
        trainer.train()
        last = [entry["full_loss"] for entry in trainer.state.log_history if "full_loss" in entry][-1]
        expected = [full_loss(trainer.model, first_batches(each, 8, pad_right, CPU)) for each in (rows, *held_out)]
        assert last == pytest.approx(expected[0], rel=EXACT) and expected[1] != pytest.approx(expected[2], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"token_seeking": False, "token_ratio": None, "context_normalize": None},
        {"token_selection": "sample"},
        {"token_ratio": 1.0},
        {"full_loss_rows": 0},
        {"token_scorer": "true_gradient"},
    ],
    ids=["no seeking", "sample", "all tokens", "off", "chosen in backward"],
)
def test_it_is_not_taken_where_the_loss_stands_for_all_tokens(tmp_path, settings):
    assert not full_losses(train(llama(), arguments(tmp_path, **settings), text_rows(24)))
    assert full_losses(train(llama(), arguments(tmp_path), text_rows(24)))


def of_logits(outputs, labels, num_items_in_batch=None):
    """A loss of one's own, whose tokens are chosen in backward."""
    return outputs.logits.square().mean()


def test_it_is_not_taken_beside_a_loss_that_tokens_had_no_choice_of(tmp_path):
    """Of rows, and of one's own: the loss is that of all tokens, and what is kept is its gradient."""
    rows = [{"input_ids": row["input_ids"], "labels": n % 2} for n, row in enumerate(text_rows(24))]
    of_rows = train(tiny_model("gpt2", "sequence_classification"), arguments(tmp_path), rows)
    own = train(llama(), arguments(tmp_path), text_rows(24), compute_loss_func=of_logits)
    models_own = train(llama(), arguments(tmp_path), text_rows(24))
    assert not full_losses(of_rows) and not full_losses(own) and full_losses(models_own)
    assert [run.trainer.full_loss.is_of_kept for run in (of_rows, own, models_own)] == [False, False, True]


@pytest.mark.parametrize("asked", [True, False])
def test_rows_that_were_asked_for_in_vain_are_told_of_once(tmp_path, asked, caplog):
    settings = {"full_loss_rows": 4, "max_steps": 3} if asked else {"max_steps": 3}
    train(llama(), arguments(tmp_path, **settings), text_rows(24))
    assert "full_loss_rows" not in caplog.text
    train(llama(), arguments(tmp_path, **settings), text_rows(24), compute_loss_func=of_logits)
    assert caplog.text.count("full_loss_rows=4 has no effect") == asked


def test_the_warning_reaches_the_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(FullLossGuard, "add", lambda self, kept, full: f"parted at {full:.1f}")
    train(llama(), arguments(tmp_path), text_rows(24))
    assert "parted at" in caplog.text
