"""Around the steps: evaluation and checkpoints are those of the plain Trainer, runs resume, and nothing is left behind."""

import gc
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import AttentionInterface, AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.masking_utils import AttentionMaskInterface

from hf_memtune import MemEfficientTrainer
from hf_memtune.core.selection import budget
from tests.support.runs import arguments, llama, pad_right, same_parameters, text_rows, train, trainer_for

ROWS = text_rows(24)


# -- evaluation and prediction -----------------------------------------------------------------------------------------


def token_accuracy(predicted):
    hit = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
    return {"accuracy": float(hit[predicted.label_ids[:, 1:] != -100].mean())}


def results(metrics):
    return {name: value for name, value in metrics.items() if name.endswith(("_loss", "_accuracy"))}


class PlainTwin(TrainerCallback):
    """In the middle of a run, evaluates and predicts with a plain Trainer on the same model and compares bit for bit."""

    def __init__(self, folder):
        self.folder, self.trainer, self.compared = folder, None, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        settings = {"seeking": False, "per_device_eval_batch_size": 5}
        plain = Trainer(model, arguments(self.folder, **settings), pad_right, eval_dataset=ROWS, compute_metrics=token_accuracy)
        assert results(self.trainer.evaluate()) == results(plain.evaluate())
        ours, theirs = self.trainer.predict(ROWS), plain.predict(ROWS)
        assert (ours.predictions == theirs.predictions).all() and (ours.label_ids == theirs.label_ids).all()
        assert len(results(ours.metrics)) == 2 and results(ours.metrics) == results(theirs.metrics)
        model.train()
        self.compared += 1


def test_evaluation_and_prediction_are_plain_forwards(tmp_path):
    twin = PlainTwin(tmp_path)
    trainer = trainer_for(
        llama(),
        arguments(tmp_path, per_device_eval_batch_size=5, train_sampling_strategy="sequential"),
        ROWS,
        callbacks=[twin],
        compute_metrics=token_accuracy,
        eval_dataset=ROWS,
    )
    twin.trainer = trainer
    trainer.train()
    assert twin.compared == 2
    real = [len(row["input_ids"]) for row in ROWS[8:16]]
    assert trainer.last_selection.counts == tuple(budget(length, 0.35) for length in real)  # the steps between did drop tokens
    assert all(count < length for count, length in zip(trainer.last_selection.counts, real))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_checkpoint(tmp_path):
    run = train(llama(), arguments(tmp_path, save_strategy="steps", save_steps=1), ROWS)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in run.trainer.model.state_dict().items())
    plain = train(llama(), arguments(tmp_path / "plain", seeking=False, save_strategy="steps", save_steps=1), ROWS, cls=Trainer)
    assert run.trainer.model.state_dict().keys() == plain.trainer.model.state_dict().keys()
    files = [sorted(path.name for path in (folder / "checkpoint-2").iterdir()) for folder in (tmp_path, tmp_path / "plain")]
    assert files[0] == files[1]
    config, theirs = ((folder / "checkpoint-2/config.json").read_text() for folder in (tmp_path, tmp_path / "plain"))
    assert config == theirs


def test_an_adapter_is_saved_and_loaded_by_peft(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = train(model, arguments(tmp_path, save_strategy="steps", save_steps=2, learning_rate=1.0), ROWS).trainer
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    batch = pad_right(ROWS[:3])
    trained, base = model.eval()(**batch).logits, llama().eval()(**batch).logits
    assert torch.equal(again.eval()(**batch).logits, trained)
    assert not torch.equal(trained, base)
    assert trainer.last_selection is not None


PLAIN = {"token_seeking": False, "token_ratio": None, "context_normalize": None}
STREAMED, SOUGHT = {"sequence_chunk_size": 4}, {"token_seeking": True, "token_ratio": 0.3}


@pytest.mark.parametrize("settings", [{}, {"token_scorer": "random"}], ids=["combined", "random"])
@pytest.mark.parametrize("saved_at", [2, 3])  # in the middle of an epoch of 3 steps, and at its end
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, settings, saved_at):
    settings |= {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 0.01}
    settings |= {"context_normalize": "sum"} if settings.get("token_scorer") == "random" else {}
    whole = train(llama(), arguments(tmp_path, save_strategy="steps", save_steps=saved_at, **settings), ROWS)
    resumed = train(llama(seed=9), arguments(tmp_path, **settings), ROWS, resume=str(tmp_path / f"checkpoint-{saved_at}"))
    assert same_parameters(resumed, whole)
    assert resumed.losses == whole.losses


def test_restored_callbacks_do_not_replace_ours(tmp_path):
    settings = {"max_steps": 4, "restore_callback_states_from_checkpoint": True}
    whole = train(llama(), arguments(tmp_path, save_strategy="steps", save_steps=2, **settings), ROWS)
    resumed = train(llama(seed=9), arguments(tmp_path, **settings), ROWS, resume=str(tmp_path / "checkpoint-2"))
    assert same_parameters(resumed, whole)
    assert resumed.trainer.method_callback in resumed.trainer.callback_handler.callbacks


@pytest.mark.parametrize("first, second, named", [
    ({}, STREAMED, "StreamingCallback"), (SOUGHT, STREAMED, "StreamingCallback"), (STREAMED, SOUGHT, "TokenSeekingCallback"), (STREAMED, {}, None),
])  # fmt: skip
def test_a_run_goes_on_with_a_method_that_its_checkpoint_was_made_without(tmp_path, first, second, named):
    """As one that ran out of memory may. It saves again, and what it saves can be resumed."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(llama(), arguments(tmp_path, **saving, max_steps=2, **PLAIN | first), ROWS)
    train(llama(seed=9), arguments(tmp_path, **saving, max_steps=4, **PLAIN | second), ROWS, resume=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert named is None or saved[named]["args"]
    again = train(llama(seed=8), arguments(tmp_path, max_steps=6, **PLAIN | second), ROWS, resume=str(tmp_path / "checkpoint-4"))
    whole = train(llama(seed=9), arguments(tmp_path, max_steps=6, **PLAIN | second), ROWS, resume=str(tmp_path / "checkpoint-2"))
    assert same_parameters(again, whole)


# -- failures ----------------------------------------------------------------------------------------------------------


class Failure(RuntimeError):
    pass


class FailingCallback(TrainerCallback):
    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self._fail)

    def _fail(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Failure


class FailingCollator:
    """Fails at its third batch, which the Trainer fetches after two steps."""

    calls = 0

    def __call__(self, rows):
        self.calls += 1
        if self.calls == 3:
            raise Failure
        return pad_right(rows)


def failing_scorer(seen):
    raise Failure


def failing_loss(outputs, labels, num_items_in_batch=None):
    raise Failure


FAILURES = {
    "callback at the beginning": {"callbacks": [FailingCallback("on_train_begin", 0)]},
    "callback in a step": {"callbacks": [FailingCallback("on_step_begin", 1)]},
    "callback before the optimizer": {"callbacks": [FailingCallback("on_pre_optimizer_step", 1)]},
    "callback after a step": {"callbacks": [FailingCallback("on_step_end", 2)]},
    "collator": {"data_collator": FailingCollator()},
    "scorer": {"token_scorer": failing_scorer},
    "loss": {"compute_loss_func": failing_loss},
}


def traces(model):
    """Everything token seeking changes for a while, on the model and outside it."""
    marks = {"_is_accelerate_prepared"}  # of every Trainer
    modules = {name: (set(vars(module)) - marks, len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    gc.collect()  # what an earlier test left in a cycle, or an error holds, may go at any time
    interfaces = [sorted(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)]
    kernels = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return modules, interfaces, kernels, _get_current_dispatch_mode(), model.training


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path, failure, accumulation):
    model, batch = llama(), pad_right(ROWS[:4])
    settings = {"max_steps": 4, "memory_trace_steps": 1, "gradient_accumulation_steps": accumulation}
    settings |= {"token_scorer": None} if failure == "scorer" else {}
    trainer = trainer_for(model, arguments(tmp_path, learning_rate=0.0, **settings), ROWS, **FAILURES[failure])
    if failure == "collator":
        trainer.data_collator.calls = 0
    before, expected = traces(model), model(**batch).logits
    with pytest.raises(Failure):
        trainer.train()
    assert traces(model) == before
    assert torch.equal(model(**batch).logits, expected)
    assert trainer.method_callback.method is None


def test_a_trace_left_on_is_seen(tmp_path):
    """Sibling: without the clean-up of `train`, the failures above are noticed."""

    class Careless(MemEfficientTrainer):
        def train(self):
            return Trainer.train(self)

    model = llama()
    args = arguments(tmp_path, memory_trace_steps=1)
    trainer = trainer_for(model, args, ROWS, cls=Careless, callbacks=[FailingCallback("on_pre_optimizer_step", 0)])
    before = traces(model)
    with pytest.raises(Failure):
        trainer.train()
    try:
        assert traces(model) != before
    finally:
        trainer.memory_callback.close()
        trainer.method_callback.remove()
    assert traces(model) == before


def test_a_finished_run_leaves_the_model_as_plain_training_does(tmp_path):
    ours, plain = llama(), llama()
    run = train(ours, arguments(tmp_path, memory_trace_steps=1), ROWS)
    train(plain, arguments(tmp_path, seeking=False), ROWS, cls=Trainer)
    assert traces(ours) == traces(plain)
    run.trainer.train()  # and can be trained again
    assert traces(ours) == traces(plain)


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    """auto_find_batch_size begins training again inside `train`: the first installation must not stay behind."""
    asked = []

    class Tight(MemEfficientTrainer):
        def training_step(self, model, inputs, *args):
            asked.append(len(inputs["input_ids"]))
            if asked[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    model = llama()
    before = traces(model)
    trainer = trainer_for(model, arguments(tmp_path, auto_find_batch_size=True, memory_trace_steps=1), ROWS, cls=Tight)
    trainer.train()
    assert max(asked) == 8 and asked[-1] <= 4
    assert traces(model) == before
