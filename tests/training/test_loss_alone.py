"""Evaluation that wants nothing but the loss: the same loss as transformers', without logits."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Trainer

from hf_memtune import MemEfficientTrainingArguments, estimate
from hf_memtune.core.head_call import HeadCall
from tests.support.runs import arguments, llama, text_rows, train, trainer_for
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE

ROWS = text_rows(12)
PLAIN = {"token_seeking": False, "token_ratio": None, "context_normalize": None}
SETTINGS = {"plain": PLAIN, "bf16": PLAIN | {"bf16": True}, "streaming": PLAIN | {"sequence_chunk_size": 4}, "seeking": {}}


def refuse_logits(monkeypatch):
    monkeypatch.setattr(HeadCall, "logits", lambda *args: pytest.fail("logits were made"))


def loss_of(make, folder, cls=None, **settings):
    kwargs = {} if cls is None else {"cls": cls}
    return trainer_for(make(), arguments(folder, seeking=cls is None, **settings), ROWS, eval_dataset=ROWS, **kwargs).evaluate()[
        "eval_loss"
    ]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_loss_of_transformers_and_needs_no_logits(name, settings, tmp_path, monkeypatch):
    make, bf16 = partial(tiny_model, name, dtype=torch.float32), settings == "bf16"
    expected = loss_of(make, tmp_path, Trainer, bf16=bf16)
    refuse_logits(monkeypatch)
    assert loss_of(make, tmp_path, **SETTINGS[settings]) == pytest.approx(expected, rel=1e-3 if bf16 else FLOAT32_INSIDE)


@pytest.mark.parametrize("settings", ["plain", "streaming", "seeking"])
def test_between_the_steps_of_a_training_too(settings, tmp_path, monkeypatch):
    refuse_logits(monkeypatch)
    more = {"eval_strategy": "steps", "eval_steps": 1}
    found = train(llama(), arguments(tmp_path, **SETTINGS[settings], **more), ROWS, eval_dataset=ROWS).trainer
    after = found.evaluate()["eval_loss"]
    assert [entry["eval_loss"] for entry in found.state.log_history if "eval_loss" in entry][-1] == pytest.approx(after, rel=1e-6)
    assert "forward" not in vars(found.model.lm_head)


def test_where_predictions_are_wanted_they_are_there(tmp_path):
    """Sibling: they are the logits, to the bit."""
    found = [
        trainer_for(llama(), arguments(tmp_path, seeking=cls is None), ROWS, **({} if cls is None else {"cls": cls})).predict(ROWS)
        for cls in (None, Trainer)
    ]
    assert np.array_equal(found[0].predictions, found[1].predictions) and found[0].predictions.ndim == 3


def test_a_head_in_which_somebody_runs_another_forward_runs_it(tmp_path):
    def doubled():
        model = llama()
        own = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 2 * own(hidden)
        return model

    expected = pytest.approx(loss_of(doubled, tmp_path, Trainer), rel=FLOAT32_INSIDE)
    assert loss_of(doubled, tmp_path, **PLAIN) == expected != loss_of(llama, tmp_path, **PLAIN)


def test_a_model_of_an_unknown_kind_is_evaluated_as_ever(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, attention_mask, labels):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    assert loss_of(Own, tmp_path, **PLAIN) == loss_of(Own, tmp_path, Trainer)


def test_an_estimate_counts_none_either(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=20_000
    )
    settings = {"use_cpu": True, "report_to": [], "per_device_train_batch_size": 1, "per_device_eval_batch_size": 64}
    args = MemEfficientTrainingArguments(str(tmp_path), **settings)
    account = estimate(config, args, sequence_length=256, evaluation=True).account
    logits = 64 * 256 * 20_000 * 4
    above = account.phase("evaluation").peak_bytes - account.phase("optimizer").by_category["weights"]
    state = account.phase("evaluation").by_category["optimizer_state"]
    assert above - state < logits / 2
