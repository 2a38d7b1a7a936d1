"""From a recipe and flags to settings: precedence, types, and every problem at once with the name that was meant."""

import warnings

import pytest
import torch

from hf_memtune.cli import tokens, train
from hf_memtune.errors import ConfigError
from hf_memtune.levers.facts import checkpoints
from tests.support.folders import ROOT

NEEDED = ["--model", "m", "--dataset", "d"]


def recipe(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        train.parse(list(arguments))
    return caught.value.problems


def only(*arguments: str) -> str:
    (problem,) = problems(*arguments)
    return problem


def test_flags_go_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    file = recipe(tmp_path, "token_seeking: true\ntoken_ratio: 0.3\nlora_r: 4\n")
    model, data, training = train.parse([file, "--token_ratio", "0.2", *NEEDED])
    assert (training.token_seeking, training.token_ratio, model.lora_r) == (True, 0.2, 4)
    assert (model.model_name_or_path, data.dataset_name) == ("m", "d")
    assert (training.output_dir, data.max_length, training.gradient_norm) == ("./out", 1024, "l2")


def test_a_flag_can_switch_off_what_the_recipe_switched_on(tmp_path):
    file = recipe(tmp_path, "token_seeking: true\nbf16: no\n")
    training = train.parse([file, "--token_seeking", "false", *NEEDED]).training
    assert training.token_seeking is False and training.bf16 is False


@pytest.mark.parametrize("in_recipe, flag", [("activation", "gradient"), ("gradient", "activation"), ("activation", "activation")])
@pytest.mark.parametrize("value", [True, False])
def test_two_names_of_one_setting_are_one(tmp_path, in_recipe, flag, value):
    file = recipe(tmp_path, f"{in_recipe}_checkpointing: {not value}\n")
    training = train.parse([file, f"--{flag}_checkpointing", str(value).lower(), *NEEDED]).training
    assert checkpoints(training) is value


def test_values_of_a_recipe_have_the_types_of_their_flags(tmp_path):
    text = "learning_rate: 5e-4\neval_strategy: no\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\ntoken_seeking: yes\n"
    text += "context_layer: -2\nalways_keep: null\nactivation_checkpointing_kwargs: {use_reentrant: false}\n"
    model, _, training = train.parse([recipe(tmp_path, text), *NEEDED])
    assert training.learning_rate == 5e-4 and training.eval_strategy == "no" and training.context_layer == -2
    assert model.lora_target_modules == ["q_proj", "v_proj"] and training.always_keep is None
    assert training.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_a_preset_of_a_recipe_fills_what_neither_it_nor_a_flag_gives(tmp_path):
    file = recipe(tmp_path, "token_seeking: true\npreset: tokenseek\ntoken_ratio: null\ncontext_weight: 2.0\n")
    training = train.parse([file, "--token_selection", "sample", *NEEDED]).training
    assert (training.seek_schedule, training.token_ratio, training.token_scorer) == ("once", 0.1, "combined")
    assert (training.context_weight, training.token_selection) == (2.0, "sample")
    assert training.given == {"context_weight", "token_selection"}


def test_the_recipe_of_streaming_turns_it_on():
    training = train.parse([str(ROOT / "configs" / "lm" / "stream.yaml"), *NEEDED]).training
    assert (training.streams, training.stream_chunk_size, training.token_seeking) == (True, 512, False)
    assert not train.parse([str(ROOT / "configs" / "lm" / "plain.yaml"), *NEEDED]).training.streams


@pytest.mark.parametrize("command", [train, tokens])
def test_help_says_what_no_value_stands_for(command):
    shown = " ".join(command.make_parser().format_help().split())
    assert "Default: step (presets: tokenseek: once, tokentune: step). --seek_cache_dir" in shown
    assert "kernel launches. (default: 512)" in shown  # a default that argparse knows is shown as ever
    assert "what transformers chooses for the model. (default: None)" not in shown


def test_hyphens_in_flags_and_negative_numbers_work():
    training = train.parse(
        [*NEEDED, "--token-seeking", "--token-scorer", "combined", "--context-layer", "-1", "--learning_rate=1e-3"]
    ).training
    assert (training.context_layer, training.learning_rate) == (-1, 1e-3)


def test_an_unknown_key_names_the_file_and_the_closest_setting(tmp_path):
    found = only(recipe(tmp_path, "token_rati: 0.2\n"), *NEEDED)
    assert found.startswith("token_rati: no such setting") and "recipe.yaml" in found and "Did you mean token_ratio?" in found


def test_an_unknown_flag_names_the_closest_setting():
    assert "Did you mean token_scorer?" in only(*NEEDED, "--token_scorers", "random")


def test_an_abbreviated_flag_is_unknown():
    assert only(*NEEDED, "--token_rat", "0.2").startswith("token_rat: no such setting")


def test_every_problem_is_reported_at_once(tmp_path):
    file = recipe(tmp_path, "lora_r: many\nunknown_thing: 1\n")
    found = problems(file, "--token_ratio", "7", "--max_length", "0", "--lora_dropout", "2", "--do_train", "--fp32", "stray")
    named = {message.partition(":")[0] for message in found}
    assert named >= {"lora_r", "unknown_thing", "token_ratio", "max_length", "lora_dropout", "do_train", "fp32"}
    assert named >= {"model_name_or_path", "dataset_name"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("token_ratio: 0.1\ntoken_ratio: 0.2\n", "token_ratio: given twice"),
        ("lora_r: null\n", "lora_r: got nothing"),
        ("- token_ratio\n", "expected lines of `name: value`"),
        ("token_ratio: [0.1\n", "not a YAML file"),
        ("seek_schedule: daily\n", "seek_schedule: invalid choice: 'daily'"),
        ("preset: paper\n", "preset: invalid choice: 'paper'"),
        ("sequence_chunk_size: 0\n", "sequence_chunk_size: got 0"),
        ("sequence_chunk_size: 64\nneftune_noise_alpha: 5\n", "neftune_noise_alpha: got 5.0 with sequence_chunk_size"),
        ("task: regression\n", "task: invalid choice: 'regression'"),
        ("load_in_4bit: true\n", "load_in_4bit: 4-bit weights are frozen"),
        ("eval_strategy: epoch\neval_fraction: 0\n", "eval_strategy: got"),
    ],
)
def test_a_recipe_that_cannot_work(tmp_path, text, expected):
    assert expected in only(recipe(tmp_path, text), *NEEDED)


def test_nothing_at_all_says_what_is_needed():
    assert {message.partition(":")[0] for message in problems()} == {"model_name_or_path", "dataset_name"}


def test_a_recipe_that_does_not_exist():
    assert "absent.yaml: not a YAML file" in only("absent.yaml", *NEEDED)


def test_an_empty_recipe_is_all_defaults(tmp_path):
    assert train.parse([recipe(tmp_path, "# nothing\n"), *NEEDED]).model.lora_r == 0


def test_a_word_after_a_flag_with_one_value_is_a_problem():
    assert "'0.3' is left over" in only(*NEEDED, "--token_seeking", "--token_ratio", "0.2", "0.3")


def test_a_second_recipe_is_a_problem(tmp_path):
    file = recipe(tmp_path, "lora_r: 2\n")
    assert only(file, "other.yaml", *NEEDED).startswith("other.yaml: expected a flag")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--lora_alpha", "8"], "lora_alpha has no effect with lora_r=0"),
        (["--task", "causal_lm", "--label_column", "y"], "label_column has no effect with task=causal_lm"),
        (
            ["--task", "causal_lm", "--text_column", "t", "--output_column", "o"],
            "output_column has no effect with task=causal_lm, text_column=t",
        ),
        (["--eval_split", "test", "--eval_fraction", "0.2"], "eval_fraction has no effect with eval_split"),
        (["--eval_fraction", "0", "--max_eval_rows", "9"], "max_eval_rows has no effect with eval_fraction=0"),
        (["--token_ratio", "0.2"], "token_ratio has no effect without token_seeking"),
        (["--max_steps", "2", "--num_train_epochs", "5"], "num_train_epochs has no effect with max_steps=2"),
        (["--preset", "tokenseek"], "preset has no effect without token_seeking"),
        (["--token_seeking", "--sequence_chunk_size", "64"], "sequence_chunk_size has no effect with token_gradient=cut"),
    ],
)
def test_a_flag_without_effect_is_an_error(flags, expected, recwarn):
    found = only(*NEEDED, *flags)
    assert found.startswith(expected) and found.endswith(". Leave it out.")
    assert not [warning for warning in recwarn if "has no effect" in str(warning.message)]  # said once


@pytest.mark.parametrize(
    "line, expected",
    [
        ("token_ratio: 0.2", "token_ratio has no effect"),
        ("lora_alpha: 8", "lora_alpha has no effect"),
        ("num_train_epochs: 2\nmax_steps: 3", "num_train_epochs has no effect"),
    ],
)
def test_a_line_of_a_recipe_without_effect_is_warned_of(line, expected, tmp_path):
    with pytest.warns(UserWarning, match=expected):
        train.parse([recipe(tmp_path, line + "\n"), *NEEDED])


def test_a_flag_may_take_the_effect_from_a_line_of_the_recipe(tmp_path):
    file = recipe(tmp_path, "token_seeking: true\ntoken_ratio: 0.2\n")
    with pytest.warns(UserWarning, match="token_ratio has no effect"):
        assert train.parse([file, *NEEDED, "--token_seeking", "false"]).training.token_seeking is False


@pytest.mark.parametrize("words", [["--resume_from_checkpoint"], ["--resume_from_checkpoint", "true"], ["--resume_from_checkpoint=latest"]])
def test_resuming_without_a_folder_is_from_the_latest(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "holds no checkpoint" in only(*NEEDED, *words)
    (checkpoint := tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    assert "no checkpoint that is complete: checkpoint-3 (trainer_state.json is missing)" in only(*NEEDED, *words)
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text("{}")
    assert train.parse([*NEEDED, *words, "--seed", "3"]).training.resume_from_checkpoint is True
    assert train.parse([recipe(tmp_path, "resume_from_checkpoint: true\n"), *NEEDED]).training.resume_from_checkpoint is True
    assert train.parse([*NEEDED, "--resume_from_checkpoint", "out/checkpoint-3"]).training.resume_from_checkpoint == "out/checkpoint-3"
    assert "got 'out/checkpoint-4', which is no folder" in only(*NEEDED, "--resume_from_checkpoint", "out/checkpoint-4")


def test_a_run_beside_checkpoints_of_another(tmp_path, monkeypatch):
    """They would be taken for its own."""
    monkeypatch.chdir(tmp_path)
    (checkpoint := tmp_path / "out" / "checkpoint-12").mkdir(parents=True)
    with pytest.warns(UserWarning, match="holds checkpoint-12 of an earlier run.*Name another output_dir, or resume"):
        train.parse(NEEDED)
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 12}')
    for words in (["--resume_from_checkpoint"], ["--resume_from_checkpoint", "out/checkpoint-12"]):
        assert "is of step 12, and max_steps is 8, so nothing is left" in only(*NEEDED, *words, "--max_steps", "8")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train.parse([*NEEDED, *words, "--max_steps", "13"])


def test_a_recipe_may_stand_behind_its_name(tmp_path):
    file = recipe(tmp_path, "learning_rate: 0.25\n")
    for words in ([file], ["--config", file], [f"--config={file}"]):
        assert train.parse([*words, *NEEDED]).training.learning_rate == 0.25


def test_integrations_are_checked_with_the_other_settings(monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: ["tensorboard"])
    found = problems("--dataset", "d", "--report_to", "tensorboard", "wandb", "wandbb")
    assert {message.partition(":")[0] for message in found} == {"report_to", "model_name_or_path"}
    assert any("'wandb', whose package is not installed" in message for message in found)
    assert any("'wandbb', expected none, all, or some of" in message for message in found)
    assert train.parse([*NEEDED, "--report_to", "tensorboard"]).training.report_to == ["tensorboard"]
    assert train.parse([*NEEDED, "--report_to", "none"]).training.report_to == []


@pytest.mark.parametrize("name, expected", [("./absent", "there is no folder"), ("recipe.yaml", "is a file"), ("empty", "holds no model")])
def test_a_model_that_is_not_where_it_should_be(name, expected, tmp_path):
    recipe(tmp_path, "")
    (tmp_path / "empty").mkdir()
    found = only("--model", name, "--dataset", "d")
    assert expected in found and "\n" not in found


def test_a_recipe_can_be_named_by_a_flag(tmp_path):
    file = recipe(tmp_path, "lora_r: 4\n")
    assert train.parse([*NEEDED, "--config", file]).model.lora_r == train.parse([file, *NEEDED]).model.lora_r == 4
