"""A run resumes from the newest checkpoint that was written to its end, and says what it passes over."""

import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_memtune.errors import ConfigError, MemTuneError, StaleCacheError
from hf_memtune.training.checkpoints import UNFINISHED, newest_complete, require_same_model, why_incomplete
from hf_memtune.training.offline import OfflineScores
from tests.support.runs import arguments, llama, text_rows, trainer_for

ROWS = text_rows(12)
ONCE = {"seek_schedule": "once", "token_scorer": "context", "max_steps": 1}
SAVING = {
    "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "token_seeking": False, "token_ratio": None, "context_normalize": None,
    "optim": "adamw_torch", "lr_scheduler_type": "linear", "learning_rate": 1e-2,
}  # fmt: skip


def dropping():
    """With dropout, so that the state of the random generators counts, too."""
    return llama(attention_dropout=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(dropping(), arguments(folder, **SAVING), ROWS)
    trainer.train()
    return folder, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARM = {
    "state missing": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "state cut off": lambda checkpoint: cut(checkpoint / "trainer_state.json"),
    "weights missing": lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
    "optimizer missing": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "scheduler missing": lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
    "generators missing": lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
    "killed while it was written": lambda checkpoint: (checkpoint / UNFINISHED).touch(),
    "weights cut off": lambda checkpoint: cut(checkpoint / "model.safetensors"),
    "optimizer cut off": lambda checkpoint: cut(checkpoint / "optimizer.pt"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_run_goes_on_from_the_newest_that_is_whole(harm, folder, run, caplog):
    newest = folder / "checkpoint-3"
    assert why_incomplete(newest) is None and newest_complete(folder) == str(newest)
    HARM[harm](newest)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(folder) == str(folder / "checkpoint-2")
    assert "passed over: checkpoint-3 (" in caplog.text
    trainer = trainer_for(dropping(), arguments(folder, **SAVING), ROWS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, run[1][name]), name


def test_a_checkpoint_is_whole_when_every_process_has_written_its_part(tmp_path, monkeypatch):
    """Others may still write the state of their generators when the first one is done."""
    trainer, checkpoint, waited = (
        trainer_for(dropping(), arguments(tmp_path, **SAVING | {"max_steps": 1}), ROWS),
        tmp_path / "checkpoint-1",
        [],
    )
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: waited.append(why_incomplete(checkpoint)))
    trainer.train()
    assert (checkpoint / "trainer_state.json").is_file() and waited[-1] == "it was being written when its process ended"
    assert why_incomplete(checkpoint) is None


def test_a_checkpoint_of_another_kind_of_model_is_refused(folder):
    """What has the same names would be loaded, and the rest left as it is."""
    trainer = trainer_for(dropping(), arguments(folder, **SAVING), ROWS)
    config = folder / "checkpoint-3" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(ConfigError, match="checkpoint-3' is another run's: of LlamaForSequenceClassification, expected LlamaForCausalLM"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_lora_of_another_kind_of_task_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    require_same_model(tmp_path, get_peft_model(llama(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])))
    require_same_model(tmp_path, llama())
    saved = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    saved.save_pretrained(tmp_path / "lora")
    require_same_model(tmp_path / "lora", get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])))
    for settings, said in (
        ({"r": 8}, "r=4, expected 8"),
        ({"lora_alpha": 9}, "lora_alpha=8, expected 9"),
        ({"target_modules": ["q_proj"]}, "other modules"),
    ):
        other = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings)
        with pytest.raises(ConfigError, match=said):
            require_same_model(tmp_path / "lora", get_peft_model(llama(), other))
    with pytest.raises(ConfigError, match="of SEQ_CLS, expected CAUSAL_LM"):
        require_same_model(tmp_path, get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))


def test_deepspeed_keeps_its_states_in_a_folder_of_its_own(folder):
    checkpoint = folder / "checkpoint-3"
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    assert "optimizer, scheduler missing" == why_incomplete(checkpoint)
    (checkpoint / "global_step3").mkdir()
    assert why_incomplete(checkpoint) is None
    (checkpoint / "rng_state.pth").unlink()
    assert why_incomplete(checkpoint) == "rng_state missing"


@pytest.mark.parametrize("harm", ["optimizer missing", "weights cut off"])
def test_a_broken_one_that_is_named_is_refused(harm, folder):
    HARM[harm](folder / "checkpoint-2")
    trainer = trainer_for(dropping(), arguments(folder, **SAVING), ROWS)
    with pytest.raises(ConfigError, match="checkpoint-2.*which is not whole"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_is_lost_would_have_been_noticed(lost, folder, run, monkeypatch):
    """The sibling: a plain Trainer goes on without them, and learns something else."""
    (folder / "checkpoint-1" / lost).unlink()
    monkeypatch.setattr("hf_memtune.training.trainer.require_complete", lambda *args: None)
    trainer = trainer_for(dropping(), arguments(folder, **SAVING), ROWS)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert not all(torch.equal(parameter, run[1][name]) for name, parameter in trainer.model.named_parameters())


def test_two_runs_add_to_one_cache_of_scores(tmp_path, monkeypatch):
    """The second scores rows of its own while the first does; both find theirs there when they resume."""
    settings = {"seek_cache_dir": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 1, **ONCE}
    one, two, score = text_rows(6), text_rows(6, seed=9), OfflineScores.score

    def score_while_another_runs(self):
        new = score(self)
        monkeypatch.undo()
        trainer_for(llama(), arguments(tmp_path / "two", **settings), two).train()
        return new

    monkeypatch.setattr(OfflineScores, "score", score_while_another_runs)
    trainer_for(llama(), arguments(tmp_path / "one", **settings), one).train()
    for name, rows in (("one", one), ("two", two)):
        resumed = trainer_for(llama(), arguments(tmp_path / name, **settings | {"max_steps": 2}), rows)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 2


def test_without_a_whole_one_the_reasons_are_named(folder, tmp_path):
    for number in (1, 2, 3):
        HARM["state missing"](folder / f"checkpoint-{number}")
    with pytest.raises(ConfigError, match="none of its checkpoints is complete: checkpoint-3 .trainer_state.json is missing"):
        newest_complete(folder)
    with pytest.raises(ConfigError, match="it has no checkpoint"):
        newest_complete(tmp_path / "nothing")


# -- what this library writes itself -----------------------------------------------------------------------------------


def test_a_broken_cache_of_scores_is_made_anew_and_not_resumed_from(tmp_path, caplog):
    settings = {"seek_cache_dir": str(tmp_path / "cache"), "save_strategy": "steps", "save_steps": 1, **ONCE}
    trainer_for(llama(), arguments(tmp_path / "run", **settings), ROWS).train()
    (cache,) = (tmp_path / "cache").glob("*.safetensors")
    whole, expected = cache.read_bytes(), {name: value.clone() for name, value in load_file(cache).items()}
    for broken in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        cache.write_bytes(broken)
        with pytest.raises(StaleCacheError, match=cache.name):
            trainer_for(llama(), arguments(tmp_path / "run", **settings | {"max_steps": 2}), ROWS).train(resume_from_checkpoint=True)
        caplog.clear()
        trainer_for(llama(), arguments(tmp_path / "run", **settings), ROWS).train()
        assert "The data is scored again" in caplog.text
        found = load_file(cache)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapters_of_another_save_are_refused(tmp_path):
    from hf_memtune import ReversibleConfig, make_reversible
    from hf_memtune.training.reversible.files import WEIGHTS, load_into, save_reversible

    model = llama(num_hidden_layers=4)
    handle = make_reversible(model, ReversibleConfig(reversible="centred"))
    save_reversible(handle, tmp_path / "one")
    for value in handle.trained.values():
        value.data += 1
    save_reversible(handle, tmp_path / "two")
    load_into(handle, tmp_path / "one")
    shutil.copy(tmp_path / "two" / WEIGHTS, tmp_path / "one" / WEIGHTS)
    with pytest.raises(MemTuneError, match="not the file that was saved with"):
        load_into(handle, tmp_path / "one")
