"""LMEvalCallback: scores every few steps, in the logs and to whoever follows them, and training is what it is without."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

pytest.importorskip("lm_eval")

import hf_memtune.training.harness as harness  # noqa: E402
from hf_memtune import LMEvalCallback, MemEfficientTrainer, MemEfficientTrainingArguments, StreamingCallback  # noqa: E402
from hf_memtune.errors import ConfigError  # noqa: E402
from tests.support.folders import ROOT, llama, tokenizer, write_rows  # noqa: E402
from tests.support.questions import questions, task_folder  # noqa: E402

SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 3}


@pytest.fixture(autouse=True)
def own_cache_and_no_description_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip, which takes a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def scoring(tmp_path):
    return LMEvalCallback("mine", every_n_steps=2, limit=5, tasks_folder=task_folder(tmp_path / "tasks", "mine"))


class Tracker(TrainerCallback):
    """What integrations hear of the logs."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append(dict(logs))


def train(folder, out, *callbacks, kind=Trainer, arguments=TrainingArguments):
    """A model with dropout: what is drawn at random decides what is learned."""
    model = AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.3)
    drawn = torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": ids, "labels": ids} for ids in drawn]
    args = arguments(str(out), **SETTINGS)
    trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_training_is_what_it_is_without(folder, scoring, tmp_path, monkeypatch):
    """With exact streaming on: scores are of passes in evaluation mode, which a method leaves alone."""
    streaming = [StreamingCallback(sequence_chunk_size=4) for _ in range(3)]
    alone = weights(train(folder, tmp_path, streaming[0]))
    trainer = train(folder, tmp_path, streaming[1], scoring)
    assert torch.equal(weights(trainer), alone)
    assert [step for step, _ in scoring.results] == [2, 4]
    in_history = {entry["step"]: entry["eval_mine_acc"] for entry in trainer.state.log_history if "eval_mine_acc" in entry}
    assert in_history == {step: results["results"]["mine"]["acc,none"] for step, results in scoring.results}
    assert all("eval_mine_acc_stderr" in entry for entry in trainer.state.log_history if "eval_mine_acc" in entry)
    monkeypatch.setattr(harness, "preserved_rng", lambda device: nullcontext())
    assert not torch.equal(weights(train(folder, tmp_path, streaming[2], scoring)), alone)


def test_trackers_that_come_before_hear_the_scores(folder, scoring, tmp_path):
    tracker = Tracker()
    train(folder, tmp_path, tracker, scoring, kind=MemEfficientTrainer, arguments=MemEfficientTrainingArguments)
    assert [logs["eval_mine_acc"] for logs in tracker.heard if "eval_mine_acc" in logs] == [
        results["results"]["mine"]["acc,none"] for _, results in scoring.results
    ]
    assert len(scoring.results) == 2


def test_the_page_runs(folder, tmp_path, monkeypatch):
    """The task file and the program of docs/evaluation.md, in a folder as it describes."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (task,), (program,) = (re.findall(rf"^```{language}\n(.*?)^```", page, re.S | re.M) for language in ("yaml", "python"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_questions.yaml").write_text(task)
    write_rows(tmp_path / "test.jsonl", questions("piqa", 5))
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments("out", **SETTINGS | {"max_steps": 200, "logging_steps": 100, "save_strategy": "no"})
    tok, ds = tokenizer(), [{"input_ids": [4, 5], "attention_mask": [1, 1]}]
    names = {"args": args, "ds": ds, "tok": tok, "collator": DataCollatorForLanguageModeling(tok, mlm=False)}
    names["model"] = AutoModelForCausalLM.from_pretrained(folder)
    exec(program, names)
    ((step, results),) = names["scores"].results
    assert step == 200 and results["n-samples"]["my_questions"] == {"original": 5, "effective": 5}


# --- refusals


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError) as caught:
        LMEvalCallback([], every_n_steps=0, limit=0, num_fewshot=-1)
    assert [message.split(": ")[1] for message in caught.value.problems] == ["every_n_steps", "limit", "num_fewshot", "tasks"]


def test_a_training_that_ends_before_it_is_scored(folder, scoring, tmp_path, caplog):
    scoring.every_n_steps = SETTINGS["max_steps"]
    train(folder, tmp_path, scoring)
    assert len(scoring.results) == 1 and "no scores" not in caplog.text
    scoring.every_n_steps += 1
    train(folder, tmp_path, scoring)
    assert len(scoring.results) == 1 and "training ends at step 4, so there will be no scores" in caplog.text


def test_a_trainer_without_a_tokenizer(folder, scoring, tmp_path):
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), TrainingArguments(str(tmp_path), **SETTINGS), callbacks=[scoring])
    with pytest.raises(ConfigError, match="processing_class=tokenizer"):
        scoring.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_model_that_is_spread_over_processes(kind, monkeypatch):
    monkeypatch.setattr(harness, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    with pytest.raises(ConfigError, match="evaluate --model FOLDER --tasks"):
        harness.require_whole_model("qa")
    monkeypatch.setattr(harness, "AcceleratorState", lambda: SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    harness.require_whole_model("qa")
