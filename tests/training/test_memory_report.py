"""The account after a run: written where it is asked for, of what was measured, with what each setting saved."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import TrainerCallback

from hf_memtune import MemEfficientTrainer, MemTuneError
from hf_memtune.forecast.estimate import estimate
from hf_memtune.memory import MemoryAccount
from hf_memtune.training.care.report.memory_report import FILES
from hf_memtune.training.care.savings import BatchShape, Savings
from tests.support.runs import arguments, llama, pad_right, same_parameters, text_rows, train, trainer_for

ROWS = text_rows(24)
PLAIN = {"token_seeking": False, "token_ratio": None, "context_normalize": None, "optim": "adamw_torch", "learning_rate": 0.01}


def with_lora():
    """With dropout, whose masks any number that is drawn would change."""
    return get_peft_model(llama(attention_dropout=0.2), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


class Draws(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(1)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with LoRA and checkpointing, its report, and the same run without one."""
    return [report_or_not(tmp_path_factory.mktemp("run"), reports) for reports in (True, False)]


def report_or_not(folder, reports, **more):
    torch.manual_seed(0)
    args = arguments(folder, memory_report=reports, gradient_checkpointing=True, memory_trace_steps=1, **PLAIN)
    return train(with_lora(), args, ROWS, **more)


def test_it_is_written_and_changes_nothing(reported, tmp_path):
    """Tracing and estimating leave the run as it was, and without the setting there are no files."""
    with_report, without = reported
    assert same_parameters(with_report, without) and with_report.losses == without.losses
    assert not same_parameters(report_or_not(tmp_path, False, callbacks=[Draws()]), without)
    folders = [run.trainer.args.output_dir for run in reported]
    plain = json.loads(open(f"{folders[0]}/{FILES[0]}").read())
    assert MemoryAccount.from_dict(plain["measured"]) == with_report.trainer.report_callback.report.measured
    page = open(f"{folders[0]}/{FILES[1]}").read()
    assert "activation_checkpointing" in page and "base_model.model.model.layers" in page
    with pytest.raises(FileNotFoundError):
        open(f"{folders[1]}/{FILES[0]}")


def test_what_was_measured_was_predicted(reported):
    """Of the second step, in which the optimizer has its state from the beginning."""
    report = reported[0].trainer.report_callback.report
    assert report.measured.phase("backward").by_category["optimizer_state"] > 0
    assert report.measured.peak_bytes <= report.predicted.peak_bytes <= 1.05 * report.measured.peak_bytes
    assert report.batch.endswith("(step 1)") and report.measured.timeline and report.measured.tensors


def test_a_step_on_two_levels_is_predicted_before_it_is_trained(tmp_path):
    """The model is copied for that, and the layers of the copy are its own; training then goes on on two levels."""
    args = arguments(tmp_path, memory_preflight=True, checkpoint_levels=2, **PLAIN)
    found = train(llama(num_hidden_layers=4), args, ROWS)
    report = found.trainer.report_callback.report
    assert report.notes == [] and found.trainer.preflight.report.predicted.peak_bytes == report.predicted.peak_bytes
    assert report.measured.peak_bytes <= report.predicted.peak_bytes <= 1.05 * report.measured.peak_bytes
    without = train(llama(num_hidden_layers=4), arguments(tmp_path, checkpoint_levels=2, **PLAIN), ROWS)
    assert same_parameters(found, without) and found.losses == without.losses


def test_what_a_setting_saved_is_the_difference_of_two_steps(reported):
    trainer = reported[0].trainer
    levers = {lever.setting: lever for lever in trainer.report_callback.report.levers}
    assert set(levers) == {"activation_checkpointing", "adapters (peft)"}
    taken = trainer.report_callback._shape
    bare = arguments(trainer.args.output_dir, memory_report=False, **PLAIN)
    without = estimate(with_lora(), bare, batch_size=taken.rows, sequence_length=taken.tokens, padded=taken.padded)
    found = levers["activation_checkpointing"]
    assert found.without_bytes == without.peak_bytes and found.saved_bytes == without.peak_bytes - found.with_bytes > 0
    assert levers["adapters (peft)"].saved_bytes > 0
    embedding = trainer.model.get_input_embeddings()
    assert embedding._forward_hooks and all(layer.gradient_checkpointing for layer in trainer.model.base_model.model.model.layers)


def test_advice_is_a_setting_that_saves_what_it_says(reported):
    trainer = reported[0].trainer
    advice, shape = trainer.report_callback.report.advice, trainer.report_callback._shape
    assert advice.exact and advice.setting == "per_device_train_batch_size=4 with gradient_accumulation_steps=2"
    args = arguments(trainer.args.output_dir, memory_report=False, gradient_checkpointing=True, gradient_accumulation_steps=2, **PLAIN)
    followed = estimate(trainer.model, args, batch_size=4, sequence_length=shape.tokens, padded=shape.padded)
    assert followed.peak_bytes == advice.peak_bytes == trainer.report_callback.report.predicted.peak_bytes - advice.saved_bytes


def test_what_cannot_be_traced_is_said_and_costs_nothing(tmp_path, monkeypatch):
    """A run is finished: whatever its report runs into, it says so."""

    def broken(self, *args, **kwargs):
        raise TypeError("no meta kernel for this one")

    monkeypatch.setattr(Savings, "_estimate", broken)
    run = train(llama(), arguments(tmp_path, memory_report=True, **PLAIN), ROWS)
    report = run.trainer.report_callback.report
    assert report.predicted is None and report.levers == [] and report.notes == ["Nothing is predicted: no meta kernel for this one."]
    assert (tmp_path / FILES[1]).exists()


def test_a_trainer_with_a_loss_of_its_own_is_not_predicted(tmp_path):
    class Own(MemEfficientTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = train(llama(), arguments(tmp_path, memory_report=True, **PLAIN), ROWS, cls=Own)
    assert run.trainer.report_callback.report.notes == [
        "Nothing is predicted: estimates are of MemEfficientTrainer, and Own has a step or a loss of its own."
    ]


def test_adapters_that_transformers_put_in_cost_no_report(tmp_path):
    """Such a model has a peft_config and is no PeftModel."""
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    run = train(model, arguments(tmp_path, memory_report=True, **PLAIN), ROWS)
    (lever,) = (lever for lever in run.trainer.report_callback.report.levers if lever.setting == "adapters (peft)")
    assert lever.without_bytes > lever.with_bytes


def test_a_forward_that_cannot_be_copied_leaves_nothing_on_the_model(tmp_path):
    """A closure runs the model itself, and would leave gradients without values on it."""
    model = llama()
    model.forward = partial(type(model).forward, model)
    own, batch = model.forward, BatchShape(2, 8, False)
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    trainer = trainer_for(model, arguments(tmp_path, memory_report=False, **PLAIN), ROWS)
    with pytest.raises(MemTuneError, match="no copy of it has"):
        Savings(trainer, batch)
    assert all(p.grad is None for p in model.parameters())


def test_reversible_layers_are_reported_without_a_prediction(tmp_path):
    run = train(llama(num_hidden_layers=4), arguments(tmp_path, memory_report=True, reversible="centred", **PLAIN), ROWS)
    report = run.trainer.report_callback.report
    assert report.predicted is None and "reversible already" in report.notes[0] and report.measured.peak_bytes > 0


def test_a_step_that_does_not_fit_leaves_no_account_open(tmp_path):
    """auto_find_batch_size begins again in the middle of the step that is accounted for, the second."""
    asked = []

    class Tight(MemEfficientTrainer):
        def training_step(self, model, inputs, *args):
            asked.append(len(inputs["input_ids"]))
            if len(asked) == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    args = arguments(tmp_path, memory_report=True, memory_preflight=False, auto_find_batch_size=True, **PLAIN)
    trainer = trainer_for(llama(), args, ROWS, cls=Tight)
    trainer.train()
    assert asked[0] > asked[-1] and trainer.report_callback.report is not None
    assert _get_current_dispatch_mode() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


def test_the_shape_of_a_batch():
    batch = pad_right(ROWS[:3])
    assert BatchShape.of(batch) == BatchShape(3, batch["input_ids"].shape[1], True)
    assert BatchShape.of(ROWS[:3]) is None, "rows that are yet to be collated"
    assert not BatchShape.of(pad_right(ROWS[:1])).padded and BatchShape.of({"pixel_values": torch.zeros(2)}) is None


def test_it_is_on_with_the_preflight(tmp_path):
    assert [arguments(tmp_path, memory_preflight=flies, **PLAIN).reports for flies in (None, True, False)] == [False, True, False]
    assert not arguments(tmp_path, memory_preflight=True, memory_report=False, **PLAIN).reports
