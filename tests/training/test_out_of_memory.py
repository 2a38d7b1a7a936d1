"""A micro-batch that does not fit is halved: the same gradient, the same global batch, the same rows, and training goes on."""

import pytest
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Trainer

from hf_memtune import MemEfficientMixin, MemEfficientTrainer, MemTuneError
from hf_memtune.training.care.recovery import halving
from hf_memtune.training.care.recovery.advice import advice
from hf_memtune.training.care.recovery.batch_parts import parts_of, row_count, shares, why_not_cut
from tests.support.little_memory import MESSAGE, FailsInBackward, small
from tests.support.runs import Run, arguments, exact_model, llama, pad_right, text_rows, train, trainer_for, worst_step
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE

EXACT = RELATIVE[torch.float64]
ROWS = text_rows(24)
PLAIN = {"token_seeking": False, "token_ratio": None, "context_normalize": None}
SAMPLE = {"token_selection": "sample", "select_from": "labels"}  # one number is drawn for each row, in their order
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
EIGHT, TWO = ({"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows} for rows in (8, 2))


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting the garbage of the whole test session takes longer than the runs."""
    monkeypatch.setattr(halving, "clear_device_cache", lambda garbage_collection: None)


def classifier_rows(kind: str) -> list[dict]:
    labels = {"regression": lambda n: n / 7, "classes": lambda n: n % 3}[kind]
    return [{"input_ids": row["input_ids"], "labels": labels(n)} for n, row in enumerate(ROWS)]


def classifier(**overrides):
    return tiny_model("bert", "sequence_classification", **overrides)


def regression():
    return classifier(num_labels=1)


def masked_lm():
    return tiny_model("bert", "masked_lm")


CASES = {
    "plain": (exact_model, PLAIN, ROWS),
    "label smoothing": (exact_model, PLAIN | {"label_smoothing_factor": 0.1}, ROWS),
    "accumulation": (exact_model, PLAIN | {"gradient_accumulation_steps": 2}, ROWS),
    "checkpointing": (exact_model, PLAIN | {"gradient_checkpointing": True}, ROWS),
    "streaming": (exact_model, PLAIN | {"sequence_chunk_size": 4, "gradient_accumulation_steps": 2}, ROWS),
    "seeking": (exact_model, SAMPLE | {"gradient_accumulation_steps": 2}, ROWS),
    "seeking in a stream": (exact_model, SAMPLE | {"token_gradient": "stream", "sequence_chunk_size": 4}, ROWS),
    "masked": (masked_lm, PLAIN, ROWS),
    "classes": (classifier, PLAIN, classifier_rows("classes")),
    "seeking classes": (classifier, {"gradient_accumulation_steps": 2}, classifier_rows("classes")),
    "regression": (regression, PLAIN, classifier_rows("regression")),
}


def run(folder, case, most=None, where="forward", **settings) -> Run:
    make, fixed, rows = CASES[case]
    model = make() if most is None else small(make(), most, where)
    return train(model, arguments(folder, **SEQUENTIAL, **(fixed | settings)), rows)


# -- the same gradient -------------------------------------------------------------------------------------------------


BACKWARD = ("accumulation", "streaming", "seeking", "regression")


@pytest.mark.parametrize("case, where", [*((case, "forward") for case in CASES), *((case, "backward") for case in BACKWARD)])
def test_halves_learn_what_the_whole_learns(tmp_path, case, where):
    """Of 8 rows, 3 fit: 4 are tried, and then 2 run at a time."""
    whole, halved = run(tmp_path, case), run(tmp_path, case, 3, where)
    assert worst_step(halved, whole) <= EXACT
    assert halved.losses == pytest.approx(whole.losses, rel=FLOAT32_INSIDE)
    assert halved.trainer.halving.rows_at_most == 2 and halved.trainer.state.global_step == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("settings", [{}, {"token_gradient": "stream", "sequence_chunk_size": 4}], ids=["cut", "stream"])
def test_halves_of_the_best_tokens_learn_what_as_many_rows_at_a_time_learn(tmp_path, settings, where):
    """The mean over kept tokens is that of each call; so many calls are as many micro-batches."""
    settings = settings | SEQUENTIAL | {"select_from": "labels"}
    whole, cut = (train(exact_model(), arguments(tmp_path, **settings, **sizes), ROWS) for sizes in (EIGHT, TWO))
    halved = train(small(exact_model(), 3, where), arguments(tmp_path, **settings, **EIGHT), ROWS)
    assert halved.trainer.halving.rows_at_most == 2
    assert worst_step(halved, cut) <= EXACT < NOTICED < worst_step(halved, whole)
    assert halved.losses == pytest.approx(cut.losses, rel=1e-6)


@pytest.mark.parametrize("case", ["plain", "streaming", "seeking"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("holds", [False, True])
def test_what_failed_is_gone_before_the_halves_run(tmp_path, monkeypatch, case, where, holds):
    """Sibling: an error that is held holds its frames, and they the activations of the whole beside those of a half."""
    make, fixed, rows = CASES[case]
    model, seen, alive, errors = small(make(), 4, where), [], [], []
    if holds:
        monkeypatch.setattr(halving, "first_line", lambda error: errors.append(error) or str(error))
    else:
        monkeypatch.setattr(halving, "clear_device_cache", clear_device_cache)

    def look(module, inputs, output):
        if torch.is_grad_enabled():
            seen.append(StorageWeakRef(output.untyped_storage()))
            alive.append(sum(not each.expired() for each in seen[:-1]))

    model.transformer.h[0].ln_1.register_forward_hook(look)
    train(model, arguments(tmp_path, **SEQUENTIAL, **(fixed | {"max_steps": 1, "gradient_accumulation_steps": 1})), rows)
    assert len(alive) >= 3 and (max(alive) > 0) is holds
    errors.clear()


def test_a_mean_of_halves_without_their_shares_is_noticed(tmp_path, monkeypatch):
    """Sibling: halves of different numbers of labels are not worth the same."""
    monkeypatch.setattr(halving, "shares", lambda inputs, parts, shifted: [1 / len(parts)] * len(parts))
    uneven = {"per_device_train_batch_size": 7}
    assert worst_step(run(tmp_path, "regression", 3, **uneven), run(tmp_path, "regression", **uneven)) > NOTICED


def test_a_gradient_that_a_failed_backward_left_is_noticed(tmp_path, monkeypatch):
    """Sibling: what the failed backward has added already stays, unless it is thrown away."""
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self, set_to_none=True: None)
    expected = run(tmp_path, "plain", max_steps=1)
    assert worst_step(run(tmp_path, "plain", 3, "backward", max_steps=1), expected) > NOTICED
    monkeypatch.undo()
    assert worst_step(run(tmp_path, "plain", 3, "backward", max_steps=1), expected) <= EXACT


def test_a_later_micro_batch_that_fails_redoes_the_earlier_ones(tmp_path):
    """The third micro-batch of four is the first that is too long, in backward: the gradients of two are there already."""

    def fails_once(model):
        calls = []

        def hook(module, inputs, output):
            calls.append(len(output))
            return FailsInBackward.apply(output) if len(calls) == 3 else output

        model.transformer.h[0].mlp.register_forward_hook(hook)
        return model

    settings = PLAIN | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 1}
    whole = train(exact_model(), arguments(tmp_path, **SEQUENTIAL, **settings), ROWS)
    found = train(fails_once(exact_model()), arguments(tmp_path, **SEQUENTIAL, **settings), ROWS)
    assert worst_step(found, whole) <= EXACT and found.losses == pytest.approx(whole.losses, rel=FLOAT32_INSIDE)
    assert found.trainer.halving.rows_at_most == 1


def test_micro_batches_that_run_again_draw_what_they_drew(tmp_path):
    """The first of two runs again whole and from where the generators were; the second, which failed once, has masks of its own."""
    model, drawn = exact_model(resid_pdrop=0.2), []

    def hook(module, inputs, output):
        drawn.append(output.detach().clone())
        if [len(values) for values in drawn] == [4, 4]:
            raise torch.OutOfMemoryError(MESSAGE)

    model.transformer.h[0].mlp.register_forward_hook(hook)
    sizes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 1}
    train(model, arguments(tmp_path, **SEQUENTIAL, **(PLAIN | sizes)), ROWS[:8])
    assert [len(values) for values in drawn] == [4, 4, 4, *[2] * 4]  # the first half thrice: twice to see whether its loss adds up
    assert torch.equal(drawn[2], drawn[0]) and not torch.equal(torch.cat(drawn[5:]), drawn[1])
    assert all(torch.equal(half, drawn[5]) for half in drawn[3:5])


def test_token_counts_of_the_logs_count_no_token_twice(tmp_path):
    counts = [
        [(e["tokens_seen"], e["tokens_kept"]) for e in found.trainer.state.log_history if "tokens_seen" in e]
        for found in (run(tmp_path, "seeking"), run(tmp_path, "seeking", 3, "backward"))
    ]
    assert counts[0] == counts[1]


def with_room_for_no_logits(model):
    """Whole logits do not fit: whoever makes some without a method that takes them in parts runs out of memory."""

    def fail(module, inputs, output):
        if type(output) is Tensor:
            raise torch.OutOfMemoryError(MESSAGE)

    model.lm_head.register_forward_hook(fail)
    return model


@pytest.mark.parametrize("most", [3, 1])
def test_whether_a_loss_adds_up_is_seen_without_whole_logits(tmp_path, most):
    """By a step with its method, which needs no more than the step that follows: also where one row fits, and no more."""
    settings = arguments(tmp_path, **SEQUENTIAL, **PLAIN, sequence_chunk_size=4)
    whole = train(exact_model(), settings, ROWS)
    halved = train(with_room_for_no_logits(small(exact_model(), most)), settings, ROWS)
    assert halved.trainer.halving.rows_at_most == {3: 2, 1: 1}[most] and worst_step(halved, whole) <= EXACT
    with pytest.raises(MemTuneError, match="one row at a time is the least"):  # the sibling: no method acts
        train(with_room_for_no_logits(small(exact_model(), most)), arguments(tmp_path, **PLAIN), ROWS)


# -- going on ----------------------------------------------------------------------------------------------------------


def test_it_says_so_and_remembers(tmp_path, caplog):
    found = run(tmp_path, "plain", 4, max_steps=3)
    warnings = [record.message for record in caplog.records if "no memory for" in record.message]
    assert len(warnings) == 1 and "no memory for 8 rows at step 0" in warnings[0] and "4 at a time" in warnings[0]
    assert found.trainer.state.global_step == 3


@pytest.mark.parametrize("settings", [{"auto_find_batch_size": True}, {"optim": "lomo"}], ids=["auto_find_batch_size", "lomo"])
def test_it_stands_aside(tmp_path, settings):
    """Where transformers begins again with a smaller batch, and where backward changes weights."""
    assert not trainer_for(llama(), arguments(tmp_path, **PLAIN, **settings), ROWS).halving.is_on
    assert trainer_for(llama(), arguments(tmp_path, **PLAIN), ROWS).halving.is_on


def test_one_row_that_does_not_fit_is_told_with_advice(tmp_path):
    with pytest.raises(MemTuneError, match="one row at a time is the least") as caught:
        run(tmp_path, "plain", 0)
    assert "activation_checkpointing=True" in str(caught.value) and "statistics" not in str(caught.value)


@pytest.mark.parametrize("settings, kind", [(PLAIN, "exact"), (SAMPLE, "exact"), ({}, "approximate")], ids=["plain", "sample", "top"])
def test_smaller_batches_are_advised_for_what_they_are(tmp_path, settings, kind):
    found = advice(trainer_for(llama(), arguments(tmp_path, **settings), ROWS), 8)
    (smaller,) = [each for each in found if "batch" in each]
    assert smaller == f"per_device_train_batch_size=4 with gradient_accumulation_steps=2 ({kind})"


@pytest.mark.parametrize("rows, expected", [(8, (4, 6)), (7, (4, 6)), (4, (2, 12)), (2, (1, 24)), (1, None)])
def test_the_advised_batch_has_as_many_rows_in_a_step(tmp_path, rows, expected):
    """Whatever did not fit: all rows, those of a last batch, or a part of them. Of a single row there is no smaller batch."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    found = advice(trainer_for(llama(), arguments(tmp_path, **PLAIN, **settings), ROWS), rows)
    smaller = [each for each in found if "batch" in each]
    expected = expected and "per_device_train_batch_size={} with gradient_accumulation_steps={} (exact)".format(*expected)
    assert smaller == [each for each in (expected,) if each]


def test_what_cannot_be_halved_is_advised_a_batch_with_as_many_rows(tmp_path):
    """The last batch has 3 rows, and a loss of its own: 2 of 8 run at a time then, and not 1 of 3."""

    class Own(MemEfficientTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(MemTuneError, match="cannot be halved: Own computes.*batch_size=2 with gradient_accumulation_steps=4 "):
        train(small(exact_model(), 2), arguments(tmp_path, **PLAIN, per_device_train_batch_size=8), ROWS[:3], cls=Own)


def test_rows_that_the_trainer_collates_itself_are_told_by_the_batch_size(tmp_path):
    def fail(model, inputs, num_items):
        raise torch.OutOfMemoryError(MESSAGE)

    trainer = trainer_for(llama(), arguments(tmp_path, **PLAIN, per_device_train_batch_size=8), ROWS)
    with pytest.raises(MemTuneError, match=r"micro-batch of 8 rows .* its inputs \(list\) do not tell .*batch_size=4 with"):
        trainer.halving.run(fail, trainer.model, ROWS[:8], None)


def test_fewer_rows_are_no_remedy_for_a_loss_that_is_no_sum(tmp_path):
    """As micro-batches of their own they would be halves as well."""
    with pytest.raises(MemTuneError, match="compute_loss_func gives") as caught:
        train(small(exact_model(), 4), arguments(tmp_path, **PLAIN), ROWS, compute_loss_func=by_class)
    assert "activation_checkpointing=True (exact)" in str(caught.value) and "batch_size" not in str(caught.value)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole, cut = (
        train(exact_model(), arguments(tmp_path, **PLAIN, **SEQUENTIAL, **sizes), ROWS, compute_loss_func=by_class)
        for sizes in ({}, halves)
    )
    assert worst_step(cut, whole) > NOTICED


@pytest.mark.parametrize("argument", ["something else", torch.ops.aten.nonzero.default], ids=["text", "operator"])
def test_other_errors_pass(tmp_path, argument):
    def fail(*args):
        raise RuntimeError(argument)

    model = llama()
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="something else|nonzero"):
        train(model, arguments(tmp_path, **PLAIN), ROWS)


def test_a_loss_that_cannot_be_added_up_is_refused(tmp_path):
    def odd(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean() * num_items_in_batch**0.5

    trainer = trainer_for(small(exact_model(), 4), arguments(tmp_path, **PLAIN), ROWS, compute_loss_func=odd)
    with pytest.raises(MemTuneError, match="neither a mean over it nor a sum"):
        trainer.train()


def by_class(outputs, labels, num_items_in_batch=None):
    """A mean whose weights are those of the tokens' classes: that of two halves is not half their sum."""
    logits, target = outputs.logits[:, :-1].double(), labels[:, 1:]
    weight = torch.linspace(0.1, 5, logits.shape[-1], dtype=logits.dtype)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)


def summed(outputs, labels, num_items_in_batch=None):
    logits, target = outputs.logits[:, :-1].double(), labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / num_items_in_batch


def test_a_mean_of_ones_own_is_not_halved_and_a_sum_is(tmp_path, monkeypatch):
    def trained(loss, most=None):
        model = exact_model() if most is None else small(exact_model(), most)
        return train(model, arguments(tmp_path, **PLAIN, **SEQUENTIAL), ROWS, compute_loss_func=loss)

    with pytest.raises(MemTuneError, match="compute_loss_func gives a loss that is no sum divided by num_items_in_batch"):
        trained(by_class, 4)
    assert worst_step(trained(summed, 4), trained(summed)) <= EXACT
    monkeypatch.setattr(halving.HalvingSteps, "_adds_up", lambda *args: True)  # the sibling: taken for a sum
    assert worst_step(trained(by_class, 4), trained(by_class)) > NOTICED


def mean_or_nothing(outputs, labels, num_items_in_batch=None):
    """A mean of one's own that is 0 where nothing has a label."""
    count = (labels[:, 1:] != -100).sum().clamp(min=1)
    return summed(outputs, labels, 1) / count


def test_a_part_without_labels_does_not_tell_what_a_loss_is(tmp_path):
    """The first half gives 0 for whatever count: the second one has to be looked at."""
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in ROWS[:4]] + ROWS[4:]
    with pytest.raises(MemTuneError, match="compute_loss_func gives a loss that is no sum divided by num_items_in_batch"):
        train(small(exact_model(), 4), arguments(tmp_path, **PLAIN, **SEQUENTIAL, max_steps=1), rows, compute_loss_func=mean_or_nothing)
    found, whole = (
        train(model, arguments(tmp_path, **PLAIN, **SEQUENTIAL), rows, compute_loss_func=summed)
        for model in (small(exact_model(), 4), exact_model())
    )
    assert worst_step(found, whole) <= EXACT


def test_a_step_without_compute_loss_is_not_cut(tmp_path):
    class OwnStep(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs, num_items_in_batch=num_items_in_batch).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Own(MemEfficientMixin, OwnStep):
        pass

    with pytest.raises(MemTuneError, match="training_step of Own does not call compute_loss"):
        train(small(exact_model(), 4), arguments(tmp_path, **PLAIN), ROWS, cls=Own)
    assert train(exact_model(), arguments(tmp_path, **PLAIN), ROWS, cls=Own).trainer.halving.rows_at_most is None


def test_a_packed_row_is_not_cut(tmp_path):
    def pack(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        positions = [n for row in rows for n in range(len(row["input_ids"]))]
        return {name: torch.tensor([values]) for name, values in (("input_ids", ids), ("labels", ids), ("position_ids", positions))}

    with pytest.raises(MemTuneError, match="no memory for a micro-batch of 1 rows .*: it has one row"):
        train(small(exact_model(n_positions=256), 0), arguments(tmp_path, **PLAIN), ROWS, data_collator=pack)


def test_answers_outside_of_their_rows_are_not_cut(tmp_path):
    """Question answering leaves them out of its means, of starts and of ends each for itself."""

    def rows(outside):
        ends = [{"start_positions": 1, "end_positions": 99 if outside and n == 3 else 2} for n in range(24)]
        return [{"input_ids": row["input_ids"]} | end for row, end in zip(ROWS, ends)]

    def model():
        return tiny_model("bert", "question_answering", num_labels=2)

    whole, halved = (train(each, arguments(tmp_path, **SEQUENTIAL, **PLAIN), rows(False)) for each in (model(), small(model(), 4)))
    assert worst_step(halved, whole) <= EXACT
    with pytest.raises(MemTuneError, match="answers lie outside their rows") as caught:
        train(small(model(), 4), arguments(tmp_path, **SEQUENTIAL, **PLAIN), rows(True))
    assert "batch_size" not in str(caught.value), "two micro-batches would have two means as well"


# -- parts -------------------------------------------------------------------------------------------------------------


def test_parts_are_all_rows_in_order():
    batch = pad_right(ROWS[:7]) | {"position_ids": torch.arange(16)[None], "flag": True, "texts": [str(n) for n in range(7)]}
    parts = parts_of(batch, 3)
    assert [row_count(part) for part in parts] == [3, 3, 1] and sum((part["texts"] for part in parts), []) == batch["texts"]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
    assert all(part["flag"] and part["position_ids"] is batch["position_ids"] for part in parts)
    assert sum(shares(batch, parts, True)) == pytest.approx(1) and len(set(shares(batch, parts, True))) > 1


@pytest.mark.parametrize(
    "batch, why",
    [
        ({"input_ids": torch.zeros(1, 4)}, "one row"),
        ({"input_ids": torch.zeros(2, 4), "cu_seq_lens_q": torch.zeros(2)}, "packed"),
        ({"input_ids": torch.zeros(2, 4), "position_ids": torch.zeros(3, 2, 4)}, "position_ids"),
        ({"anything": torch.zeros(2, 4)}, "how many rows"),
        ({"input_ids": torch.zeros(2, 4), "labels": torch.zeros(2, 4)}, None),
    ],
)
def test_what_is_one_piece_is_not_cut(batch, why):
    found = why_not_cut(batch)
    assert found is None if why is None else why in found
