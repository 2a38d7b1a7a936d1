"""Offline seeking: scores are taken once (or once an epoch), belong to rows by content, and never to another model."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_memtune import MemEfficientMixin, MemEfficientTrainer, StaleCacheError, TokenSeekingCallback, TokenSeekingConfig
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.training import offline
from hf_memtune.training.fingerprint import model_fingerprint
from tests.support.runs import (
    DrawingRows,
    arguments,
    exact_model,
    llama,
    pad_right,
    same_parameters,
    text_rows,
    train,
    trainer_for,
    worst_step,
)
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE, close

ROWS = text_rows(16)


@pytest.fixture
def passes(monkeypatch):
    """The batches that scoring passes have looked at."""
    seen, inspect = [], TokenSeeking.inspect
    monkeypatch.setattr(TokenSeeking, "inspect", lambda self, batch, *rest: seen.append(batch) or inspect(self, batch, *rest))
    return seen


def once(tmp_path, rows=ROWS, model=None, resume=None, token_scorer=None, cls=MemEfficientTrainer, **settings):
    settings = {"seek_schedule": "once", "seek_cache_dir": str(tmp_path / "cache")} | settings
    settings |= {} if token_scorer is None else {"token_scorer": None}  # the arguments name no other
    return train(model or llama(), arguments(tmp_path / "out", **settings), rows, cls, resume, token_scorer=token_scorer)


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.safetensors"))


class Recording(MemEfficientTrainer):
    """Keeps the scores each step was selected by, and what the step would have scored itself."""

    def training_step(self, model, inputs, *args):
        if not hasattr(self, "compared"):
            self.compared, self.batches = [], []
        self.batches.append(inputs)
        self.compared.append((self.method_callback.offline.lookup(inputs), self.method_callback.method.inspect(dict(inputs)).values))
        return super().training_step(model, inputs, *args)


def adapted(seed, start=True):
    model = llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM"))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_file_of_the_first(tmp_path, passes):
    first = once(tmp_path)
    (file,) = files(tmp_path)
    written = file.stat().st_mtime_ns
    assert sum(len(batch["input_ids"]) for batch in passes) == len(ROWS)
    passes.clear()
    second = once(tmp_path)
    assert not passes and files(tmp_path) == [file] and file.stat().st_mtime_ns == written
    assert same_parameters(second, first)


def changed_weights():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-3
    return model


@pytest.mark.parametrize("change", [{"gradient_weight": 0.5}, {"context_normalize": "sum"}, {"model": changed_weights}])
def test_other_weights_or_settings_have_another_file(tmp_path, passes, change):
    once(tmp_path)
    passes.clear()
    once(tmp_path, **{name: value() if callable(value) else value for name, value in change.items()})
    assert passes and len(files(tmp_path)) == 2


def test_settings_that_do_not_change_scores_share_the_file(tmp_path, passes):
    once(tmp_path)
    passes.clear()
    once(tmp_path, token_ratio=0.5, select_from="labels", context_chunk_size=4)
    assert not passes and len(files(tmp_path)) == 1


def test_new_and_changed_rows_are_scored_and_added(tmp_path, passes):
    once(tmp_path)
    changed = dict(ROWS[5], input_ids=ROWS[5]["input_ids"][:-1] + [60], labels=ROWS[5]["labels"])
    passes.clear()
    once(tmp_path, rows=[*ROWS[:5], changed, *ROWS[6:], *text_rows(3, seed=8)])
    assert 0 < len(passes) < 3  # of batches of 8, those that hold a row that is not known
    assert len(files(tmp_path)) == 1
    passes.clear()
    once(tmp_path, rows=[*ROWS, *text_rows(3, seed=8), changed])
    assert not passes


def test_without_a_folder_the_file_is_beside_the_data_set(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "data")
    once(tmp_path, rows=Dataset.load_from_disk(str(tmp_path / "data")), seek_cache_dir=None)
    assert len(list((tmp_path / "data").glob("seek-*.safetensors"))) == 1
    once(tmp_path, rows=rows, seek_cache_dir=None)  # in memory: nothing to be beside of
    assert len(list((tmp_path / "out").glob("seek-*.safetensors"))) == 1


def test_a_read_only_data_set_is_left_alone(tmp_path, monkeypatch):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "data")
    monkeypatch.setattr(offline.os, "access", lambda *args: False)  # root may write everywhere
    once(tmp_path, rows=Dataset.load_from_disk(str(tmp_path / "data")), seek_cache_dir=None)
    assert not list((tmp_path / "data").glob("seek-*")) and list((tmp_path / "out").glob("seek-*"))


# -- the scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, head", [("gpt2", None), ("llama", None), ("bert", "masked_lm"), ("llama", "sequence_classification")])
def test_scores_are_those_the_step_would_take_with_the_first_weights(tmp_path, name, head):
    rows = ROWS if head != "sequence_classification" else [row | {"labels": n % 3} for n, row in enumerate(ROWS)]
    model = tiny_model(name, head, dtype=torch.float64)
    run = once(tmp_path, rows=rows, model=model, cls=Recording, learning_rate=0.0, per_device_eval_batch_size=3)
    for (ours, theirs), batch in zip(run.trainer.compared, run.trainer.batches):  # 3 rows were scored, 8 are trained on: other padding
        assert_same_scores(ours["decoder"], theirs["decoder"], batch["attention_mask"].bool())
    assert len(run.trainer.compared) == 2


def test_pairs_are_found_again_under_other_padding(tmp_path):
    """Rows of the encoder and of the decoder are padded apart, and a decoder without a mask shows its padding in the labels alone."""
    rows = [a | {"labels": b["input_ids"]} for a, b in zip(ROWS, text_rows(16, seed=4))]
    run = once(tmp_path, rows=rows, model=tiny_model("bart", "seq2seq"), cls=Recording, learning_rate=0.0, per_device_eval_batch_size=3)
    for (ours, theirs), batch in zip(run.trainer.compared, run.trainer.batches):
        assert_same_scores(ours["encoder"], theirs["encoder"], batch["attention_mask"].bool())
        assert_same_scores(ours["decoder"], theirs["decoder"], batch["labels"] != -100)
    assert len(run.trainer.compared) == 2


def assert_same_scores(found, expected, real):
    """Of real tokens; and that they are no constant, which any order of tokens would pass for."""
    assert found.shape == real.shape and found[real].std() > 0
    torch.testing.assert_close(found[real], expected[real].float(), **close(torch.float32))


def test_scores_beside_another_reference_are_others(tmp_path):
    """Of the excess loss: the file is that of the trained model and of the one it is compared with."""
    settings = {
        "token_scorer": "excess_loss",
        "context_normalize": None,
        "seek_schedule": "once",
        "seek_cache_dir": str(tmp_path / "cache"),
    }
    found = []
    for seed in (1, 2, 1):
        llama(seed=seed).save_pretrained(reference := tmp_path / f"reference-{seed}")
        args = arguments(tmp_path / "out", max_steps=1, reference_model=str(reference), **settings)
        found.append(train(llama(), args, ROWS, Recording).trainer.compared[0][0]["decoder"])
    assert len(files(tmp_path)) == 2 and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_scores_are_taken_in_the_precision_of_training(tmp_path):
    """An adapter's wrapper is what autocasts in training, and inspection goes past it."""

    def scores(folder, **settings):
        run = once(tmp_path / folder, model=adapted(1), learning_rate=0.0, cls=Recording, **settings)
        return run.trainer.compared[0][0]["decoder"]

    assert not torch.equal(scores("half", bf16=True), scores("full"))


def test_training_on_once_scored_rows_is_training_by_the_step_at_first(tmp_path):
    offline_run = once(tmp_path, model=exact_model(), learning_rate=0.0)
    step_run = train(exact_model(), arguments(tmp_path, learning_rate=0.0), ROWS)
    assert offline_run.losses == pytest.approx(step_run.losses, rel=FLOAT32_INSIDE)


def without_labels(outputs, labels, num_items_in_batch=None):
    """A loss of logits: the model is called without the labels."""
    shifted = labels[:, 1:].flatten()
    losses = outputs.logits[:, :-1].flatten(0, 1).square().sum(-1)
    return losses[shifted != -100].sum() / num_items_in_batch


class Twice(Trainer):
    """Calls the model on the rows in another order, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        other = {name: value.flip(0) for name, value in inputs.items()}
        return model(**inputs).loss + model(**other).loss.square()


def by_hidden_state(seen):
    """Reads no label, and no loss."""
    return seen.last_hidden_state[..., 0]


def by_another(seen):
    return seen.last_hidden_state[..., 1]


@pytest.mark.parametrize("case", ["without labels", "two calls"])
def test_a_loss_of_ones_own_finds_the_scores_of_its_rows(tmp_path, case):
    cls = type("Mine", (MemEfficientMixin, Twice if case == "two calls" else Trainer), {})
    loss = without_labels if case == "without labels" else None

    def run(scorer, schedule):
        args = arguments(tmp_path / "out", seek_schedule=schedule, learning_rate=0.0, token_scorer=None, context_normalize=None)
        return train(exact_model(), args, ROWS, cls, compute_loss_func=loss, token_scorer=scorer)

    once_scored, by_step = (run(by_hidden_state, schedule) for schedule in ("once", "step"))
    assert worst_step(once_scored, by_step) <= RELATIVE[torch.float64]
    assert worst_step(once_scored, run(by_another, "step")) > NOTICED


def test_a_callback_alone_says_that_it_cannot_tell_rows_without_labels(tmp_path):
    config = TokenSeekingConfig(token_seeking=True, token_scorer="context", seek_schedule="once", seek_cache_dir=str(tmp_path))

    def run(**kwargs):
        trainer = trainer_for(llama(), arguments(tmp_path, seeking=False), ROWS, Trainer, **kwargs)
        trainer.add_callback(TokenSeekingCallback(config, trainer=trainer))
        return trainer.train()

    run()
    with pytest.raises(StaleCacheError, match="called without labels.*MemEfficientMixin"):
        run(compute_loss_func=without_labels)


def test_the_last_rows_are_scored_when_training_drops_them(tmp_path):
    run = once(tmp_path, rows=text_rows(19), dataloader_drop_last=True, num_train_epochs=3, max_steps=-1)
    assert run.trainer.state.global_step == 3 * (19 // run.trainer.args.train_batch_size)


def test_rows_that_change_as_they_are_read_are_refused(tmp_path):
    """Random masking: the rows of a batch are never those that were scored."""
    drawn = iter(range(10**6))

    def noisy(rows):
        batch = pad_right(rows)
        batch["input_ids"][:, 0] = 5 + next(drawn) % 50
        return batch

    trainer = trainer_for(llama(), arguments(tmp_path, seek_schedule="once", seek_cache_dir=str(tmp_path)), ROWS, data_collator=noisy)
    with pytest.raises(StaleCacheError, match="seek_schedule=step"):
        trainer.train()
    assert trainer.method_callback.method is None


# -- schedules and resumed runs ----------------------------------------------------------------------------------------


def test_each_epoch_is_scored_anew(tmp_path, passes):
    run = train(llama(), arguments(tmp_path, seek_schedule="epoch", num_train_epochs=3, max_steps=-1), ROWS)
    assert sum(len(batch["input_ids"]) for batch in passes) == 3 * len(ROWS)
    assert run.trainer.method_callback.offline is None  # not kept in memory after training


@pytest.mark.parametrize("schedule", ["once", "epoch"])
@pytest.mark.parametrize("saved_at", [2, 3])  # of epochs of two steps
def test_a_resumed_run_keeps_the_scores_of_the_first(tmp_path, schedule, saved_at):
    settings = {"seek_schedule": schedule, "max_steps": 5, "learning_rate": 0.5}
    whole = once(tmp_path, save_strategy="steps", save_steps=saved_at, **settings)
    resumed = once(tmp_path, model=llama(seed=9), resume=str(tmp_path / f"out/checkpoint-{saved_at}"), **settings)
    assert same_parameters(resumed, whole)


def by_position(seen):
    return torch.arange(seen.attention_mask.shape[1]).expand(seen.attention_mask.shape) + seen.last_hidden_state[..., 0]


def test_a_resumed_run_keeps_the_scores_of_a_function(tmp_path, passes):
    settings = {"token_scorer": by_position, "max_steps": 4, "learning_rate": 0.5}
    whole = once(tmp_path, save_strategy="steps", save_steps=2, **settings)
    passes.clear()
    resumed = once(tmp_path, resume=str(tmp_path / "out/checkpoint-2"), **settings)
    assert not passes and same_parameters(resumed, whole)
    once(tmp_path, **settings)  # a fresh run scores again: the function may have changed
    assert passes and not files(tmp_path)


def test_a_resumed_run_without_its_scores_is_refused(tmp_path):
    once(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    (file,) = files(tmp_path)
    file.unlink()
    with pytest.raises(StaleCacheError, match="is gone"):
        once(tmp_path, resume=str(tmp_path / "out/checkpoint-1"))


# -- nothing else changes ----------------------------------------------------------------------------------------------


def test_a_scoring_pass_does_not_change_what_training_draws(tmp_path):
    """Generators that the collator and the rows use are put back too."""

    def drawing(rows):
        random.random(), np.random.rand(), torch.rand(1)
        return pad_right(rows)

    def run(schedule):
        settings = {"seek_schedule": schedule, "max_steps": 4}
        settings |= {"accelerator_config": {"use_seedable_sampler": False}}  # the order of rows is drawn from torch's generator
        order = []

        class Watching(MemEfficientTrainer):
            def training_step(self, model, inputs, *args):
                order.append((inputs["input_ids"][:, 0].tolist(), random.random(), np.random.rand(), torch.rand(1).item()))
                return super().training_step(model, inputs, *args)

        rows = DrawingRows(ROWS)
        train(llama(), arguments(tmp_path, **settings), rows, cls=Watching, data_collator=drawing)
        return [*order, rows.next_draw]

    drawn = run("step")
    assert run("epoch") == run("once") == drawn
    assert run("once") == drawn  # with a file to read


def test_a_row_is_known_whatever_pads_it():
    rows = [{k: torch.tensor(v) for k, v in row.items()} for row in ROWS[:2]]
    alone = [next(offline.row_digests({k: v[None] for k, v in row.items()})) for row in rows]
    right = pad_right(ROWS[:2])
    left = {"attention_mask": right["attention_mask"].flip(1)}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        left[name] = torch.full_like(right[name], fill)
        left[name][left["attention_mask"].bool()] = right[name][right["attention_mask"].bool()]
    assert list(offline.row_digests(right)) == list(offline.row_digests(left)) == alone
    other = pad_right([dict(ROWS[0], labels=[-100] * len(ROWS[0]["labels"])), ROWS[1]])
    assert list(offline.row_digests(other))[0] != alone[0] and list(offline.row_digests(other))[1] == alone[1]


def test_a_fingerprint_sees_every_weight():
    first = model_fingerprint(llama())
    assert model_fingerprint(llama()) == first
    assert model_fingerprint(changed_weights()) != first
    swapped = llama()
    with torch.no_grad():
        weight = swapped.lm_head.weight
        weight[[0, 1]] = weight[[1, 0]].clone()
    assert model_fingerprint(swapped) != first
    assert model_fingerprint(llama(torch.bfloat16)) != first


def test_a_fresh_adapter_does_not_change_a_fingerprint():
    """LoRA's A is drawn anew in every run, and does nothing until B is trained."""
    assert model_fingerprint(adapted(1)) == model_fingerprint(adapted(2))
    assert model_fingerprint(adapted(1, False)) != model_fingerprint(adapted(2, False))
