"""`hf-memtune train`: every recipe of configs/ runs, and what it leaves behind loads again."""

import json
import math
import re

import pytest
import yaml

from hf_memtune import MemEfficientTrainer
from hf_memtune.cli import main, train
from hf_memtune.errors import ConfigError
from tests.support.folders import ROOT
from tests.support.train import REVERSIBLE, arguments, summary

OTHERS = ("glue", "qa", "accelerate", "tasks")  # of other commands; of `accelerate launch`; of lm-eval
MOST = {"max_length": 1024, "warmup_steps": 1}  # positions of the model here; of two steps
RECIPES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in OTHERS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe, chat_model, encoder, instructions, reviews, tmp_path, capsys):
    pair = (encoder, reviews) if recipe.startswith("classification/") else (chat_model, instructions)
    settings = yaml.safe_load((ROOT / "configs" / recipe).read_text())
    # rows are so short here that a tenth of their tokens may all be prompt, and nothing would be learned
    more = ["--token_ratio", "0.5"] if settings.get("token_seeking") else []
    more += [word for name, most in MOST.items() if settings.get(name, 0) > most for word in (f"--{name}", str(most))]
    assert main(["train", *arguments(recipe, *pair, *more)]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("held-out loss", "peak memory", "seconds per step"))
    numbers = summary(tmp_path)
    before, after = numbers["held_out_loss"]
    assert math.isfinite(before) and math.isfinite(after) and before != after
    assert (numbers["held_out_scores"].keys() == {"accuracy"}) == recipe.startswith("classification/")
    assert numbers["steps"] == 2 and numbers["peak_bytes"] > 0 and numbers["step_seconds"] > 0
    assert (0 < numbers["tokens_kept"] < numbers["tokens_seen"]) == bool(settings.get("token_seeking"))
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert saved >= {"adapter_model.safetensors" if "lora_r" in settings else "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_what_it_is_for(recipe):
    assert (ROOT / "configs" / recipe).read_text().startswith("# ")


OF_A_METHOD = {"activation_checkpointing", "sequence_chunk_size", "token_seeking", "token_ratio", "preset", "load_in_4bit", "dtype"}


def test_recipes_for_the_same_data_differ_in_the_method_alone():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "lm").glob("*.yaml")}
    rest = [{name: value for name, value in each.items() if name not in OF_A_METHOD} for each in recipes.values()]
    assert len(rest) == 6 and all(each == rest[0] for each in rest)
    assert recipes["stream"] == recipes["plain"] | {"sequence_chunk_size": 512}
    assert recipes["qlora"].keys() - recipes["stream"].keys() == {"load_in_4bit", "dtype"}
    assert len({json.dumps(each, sort_keys=True) for each in recipes.values()}) == 6


def test_without_a_recipe_all_parameters_train(model, instructions, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    assert main(["train", *arguments(None, model, instructions, "--token_seeking", "--output_dir", "elsewhere")]) == 0
    assert "(100.00%)" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert not (tmp_path / "out").exists()


def test_a_chunk_size_is_chosen_and_told(model, instructions, tmp_path, capsys):
    assert main(["train", *arguments(None, model, instructions, "--sequence_chunk_size", "auto", "--chunk_budget", "4GiB")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"sequence_chunk_size=\d+", card) and "auto" not in card


def test_plain_text_and_an_evaluation_in_between(model, instructions, tmp_path):
    flags = "--text_column output --eval_strategy steps --eval_steps 1 --lora_r 2 --lora_target_modules q_proj v_proj".split()
    assert main(["train", *arguments(None, model, instructions, *flags)]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 2]  # in between, at the end, after training


def test_nothing_held_out_is_said(model, instructions, tmp_path, capsys):
    assert main(["train", *arguments(None, model, instructions, "--eval_fraction", "0")]) == 0
    assert "not measured before, not measured after" in " ".join(capsys.readouterr().out.split())
    assert summary(tmp_path)["held_out_loss"] == [None, None]


@pytest.fixture
def steps(monkeypatch):
    """One for each step of a training; of a run that was resumed those that were left."""
    taken, step = [], MemEfficientTrainer.training_step
    monkeypatch.setattr(MemEfficientTrainer, "training_step", lambda *given: taken.append(1) or step(*given))
    return taken


def test_a_run_is_resumed(model, instructions, tmp_path, steps):
    run = arguments(None, model, instructions, "--token_seeking", "--save_strategy", "steps", "--save_steps", "1")
    assert main(["train", *run]) == 0
    ended = summary(tmp_path)["held_out_loss"][1]
    assert main(["train", *run, "--resume_from_checkpoint", "out/checkpoint-1"]) == 0
    assert summary(tmp_path)["held_out_loss"] == [None, ended]  # the model before is not that of the checkpoint
    assert len(steps) == 2 + 1


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--max_length", "4096"], "the model has positions for 1024"),
        (["--lora_r", "2", "--lora_target_modules", "absent"], "lora_target_modules"),
        (["--text_column", "body"], "no column 'body'"),
        (["--token_seeking", "--token_scorer", "best"], "token_scorer"),
        (["--token_seeking", "--context_layer", "9"], "context_layer"),
    ],
)
def test_what_only_shows_with_the_model_and_the_data(flags, expected, model, instructions, capsys):
    assert main(["train", *arguments(None, model, instructions, *flags)]) == 2
    assert expected in capsys.readouterr().err


def test_two_seeds_are_measured_on_the_same_rows(model, instructions, tmp_path):
    firsts = []
    for seed in ("1", "2"):
        assert main(["train", *arguments("lm/seek.yaml", model, instructions, "--seed", seed)]) == 0
        firsts.append(summary(tmp_path)["held_out_loss"][0])
    assert firsts[0] == firsts[1]  # new adapters add nothing to the model


def test_the_trainer_gets_what_was_asked_for(model, instructions):
    flags = ["--lora_r", "2", "--lora_dropout", "0.25", "--dtype", "bfloat16", "--attn_implementation", "eager"]
    trainer, rows = train.make_trainer(train.parse(arguments(None, model, instructions, *flags)))
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_dropout, rows.classes) == (2, 0.25, None)
    base = trainer.model.get_base_model()
    assert str(base.dtype) == "torch.bfloat16" and base.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], 8),
        (["--per_device_train_batch_size", "2"], 2),
        (["--per_device_train_batch_size", "16"], 8),
        (["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "5"], 5),
    ],
)
def test_no_more_rows_are_evaluated_at_a_time_than_are_trained_on_unless_given(flags, expected, model, instructions):
    words = ["--model", str(model), "--dataset", str(instructions), *flags]
    assert train.parse(words).training.per_device_eval_batch_size == expected


def test_the_commands_trainer_says_that_it_evaluates(model, instructions):
    """So that a preflight tries it; sibling: without rows that are held out there is nothing to try."""
    for fraction, expected in (("0.25", True), ("0", False)):
        trainer, _ = train.make_trainer(train.parse(arguments(None, model, instructions, "--eval_fraction", fraction)))
        assert trainer.args.eval_strategy == "no" and trainer.evaluates == expected


@pytest.mark.parametrize("scorer, is_of_kept", [("loss", True), ("true_gradient", False)])
def test_a_training_loss_says_whether_it_is_that_of_the_kept_tokens(scorer, is_of_kept, model, instructions, tmp_path, capsys):
    """What is chosen in backward had no part in it."""
    flags = ["--token_seeking", "--token_selection", "top", "--token_scorer", scorer]
    assert main(["train", *arguments(None, model, instructions, *flags)]) == 0
    assert summary(tmp_path)["loss_of_kept"] is is_of_kept
    assert ("(of the kept tokens)" in capsys.readouterr().out) is is_of_kept
    assert ("(of the kept tokens)" in (tmp_path / "out" / "README.md").read_text()) is is_of_kept


def test_reversible_adapters_are_written_loaded_and_trained_further(model, instructions, tmp_path, capsys):
    assert main(["train", *arguments(None, model, instructions, *REVERSIBLE)]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"reversible_adapters.safetensors", "reversible_config.json", "tokenizer.json"}
    assert "model.safetensors" not in written
    trained = summary(tmp_path)["held_out_loss"][1]
    more = ["--reversible_adapters", "out", "--output_dir", "more"]
    assert main(["train", *arguments(None, model, instructions, *more)]) == 0
    numbers = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert numbers["held_out_loss"][0] == trained != numbers["held_out_loss"][1]
    assert (tmp_path / "more" / "reversible_adapters.safetensors").exists()
    assert main(["train", *arguments(None, model, instructions, *more, *REVERSIBLE)]) == 2
    assert "Leave out reversible" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--lora_r", "2"]], ids=["all", "lora"])
def test_adapters_are_not_trained_on_but_merged_or_resumed(flags, model, instructions, tmp_path, capsys, steps):
    common = ["--eval_split", "train[:8]", "--learning_rate", "0.05"]
    run = arguments(None, model, instructions, "--lora_r", "2", *common)
    assert main(["train", *run, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    trained = summary(tmp_path)["held_out_loss"][1]
    assert main(["train", *arguments(None, "out", instructions, *flags, *common, "--output_dir", "more")]) == 2
    shown = capsys.readouterr().err
    assert "'out' holds LoRA adapters" in shown and "hf-memtune merge --model out" in shown and not (tmp_path / "more").exists()
    assert main(["merge", "--model", "out", "--output_dir", "merged"]) == 0
    assert main(["train", *arguments(None, "merged", instructions, *flags, *common, "--output_dir", "more")]) == 0
    first, last = json.loads((tmp_path / "more" / "summary.json").read_text())["held_out_loss"]
    assert first == pytest.approx(trained, rel=1e-5) and last != pytest.approx(trained, rel=1e-3)
    steps.clear()
    assert main(["train", *run, "--resume_from_checkpoint", "out/checkpoint-1"]) == 0
    assert summary(tmp_path)["held_out_loss"][1] == trained and len(steps) == 1


@pytest.mark.parametrize("command", ["train", "glue", "qa"])
@pytest.mark.parametrize("coupled", [False, True], ids=["plain", "reversible"])
def test_every_command_that_trains_refuses_adapters_with_what_helps(command, coupled, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", *(["reversible_config.json"] if coupled else [])):
        (tmp_path / "out" / name).write_text("{}")
    assert main([command, "--model", "out"]) == 2
    shown = capsys.readouterr().err
    assert "'out' holds LoRA adapters" in shown and "--resume_from_checkpoint" in shown
    assert ("merge" in shown) != coupled  # what acts between the halves of a layer cannot be merged


def test_adapters_that_no_folder_shows_are_refused_once_loaded(model, instructions, tmp_path, monkeypatch):
    """As those of the hub are."""
    assert main(["train", *arguments(None, model, instructions, "--lora_r", "2")]) == 0
    monkeypatch.setattr("hf_memtune.cli.train.problems_of_trained", lambda name: [])
    for name, works in (("out", False), (model, True)):
        settings = train.parse(arguments(None, name, instructions, "--output_dir", "more"))
        if works:
            train.make_trainer(settings)
        else:
            pytest.raises(ConfigError, train.make_trainer, settings).match("merge it first")


def test_a_reversible_run_is_resumed(model, instructions, tmp_path, steps):
    run = arguments(None, model, instructions, *REVERSIBLE, "--save_strategy", "steps", "--save_steps", "1")
    assert main(["train", *run]) == 0
    ended = summary(tmp_path)["held_out_loss"][1]
    assert main(["train", *run, "--resume_from_checkpoint", "out/checkpoint-1"]) == 0
    assert summary(tmp_path)["held_out_loss"][1] == ended and len(steps) == 2 + 1


def test_qlora_inside_reversible_layers(model, instructions, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    coupled = ["--load_in_4bit", "true", "--reversible", "centred", "--adapter_rank", "0"]
    assert main(["train", *arguments(None, model, instructions, *coupled, "--lora_r", "4")]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"adapter_model.safetensors", "reversible_config.json"} and summary(tmp_path)["held_out_loss"][0] > 0
    assert main(["train", *arguments(None, model, instructions, *coupled)]) == 2
    assert "adapters of reversible layers do not count" in capsys.readouterr().err


def test_two_levels(model, instructions, tmp_path):
    assert main(["train", *arguments(None, model, instructions, "--checkpoint_levels", "2")]) == 0
    levels = summary(tmp_path)["held_out_loss"]
    assert main(["train", *arguments(None, model, instructions)]) == 0
    assert summary(tmp_path)["held_out_loss"] == levels


def test_plain_qlora_learns_in_every_layer_after_an_evaluation(model, instructions):
    """On some CPUs bitsandbytes makes a 4-bit weight at its first evaluation into one that no gradient passes."""
    pytest.importorskip("bitsandbytes")
    trainer, _ = train.make_trainer(train.parse(arguments(None, model, instructions, "--load_in_4bit", "true", "--lora_r", "4")))
    trainer.evaluate()
    trainer.model.train()(**next(iter(trainer.get_train_dataloader()))).loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 14 and not [name for name, grad in gradients.items() if grad is None or not grad.any()]
