"""`hf-memtune evaluate`: the loss that training measures, of the model and of adapters that were trained on it; scores on tasks."""

import json

import pytest

from hf_memtune.cli import evaluate, main
from hf_memtune.core.head_call import HeadCall
from hf_memtune.errors import ConfigError
from tests.support.questions import question_files, questions, task_folder
from tests.support.train import REVERSIBLE, arguments, summary


def measured(*flags):
    return evaluate.measured(evaluate.parse([str(flag) for flag in flags]))


AT_A_TIME = ["--per_device_eval_batch_size", "8"]  # as `evaluate` does by itself: the loss is a mean over batches


def test_the_loss_is_that_of_training_and_needs_no_logits(model, instructions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HeadCall, "logits", lambda *args: pytest.fail("logits were made"))
    held_out = ["--eval_split", "train[:10]", "--learning_rate", "0.05", *AT_A_TIME]
    assert main(["train", *arguments(None, model, instructions, *REVERSIBLE, *held_out)]) == 0
    before, after = summary(tmp_path)["held_out_loss"]
    common = ("--model", model, "--dataset", instructions, "--dataset_split", "train[:10]")
    with_adapters = measured(*common, "--reversible_adapters", "out")
    assert with_adapters == {"rows": 10, "loss": pytest.approx(after, rel=1e-5)}
    assert measured(*common)["loss"] != pytest.approx(after, rel=1e-3) and before != after
    assert measured(*common, "--max_eval_rows", "4")["rows"] == 4
    capsys.readouterr()
    assert main(["evaluate", *map(str, common), "--reversible_adapters", "out"]) == 0
    assert f"{with_adapters['loss']:.4f}" in capsys.readouterr().out


def test_a_classifier_has_its_head(encoder, reviews, tmp_path):
    task = [
        "--task",
        "sequence_classification",
        "--max_length",
        "128",
        "--eval_split",
        "train[:16]",
        "--learning_rate",
        "0.05",
        "--max_steps",
        "4",
    ]
    assert main(["train", *arguments(None, encoder, reviews, *REVERSIBLE, *task)]) == 0
    found = summary(tmp_path)
    common = (
        "--model",
        encoder,
        "--dataset",
        reviews,
        "--task",
        "sequence_classification",
        "--max_length",
        "128",
        "--dataset_split",
        "train[:16]",
    )
    expected = {"rows": 16, "loss": pytest.approx(found["held_out_loss"][1], rel=1e-5), "accuracy": found["held_out_scores"]["accuracy"][1]}
    assert measured(*common, "--reversible_adapters", "out") == expected


def test_lora_inside_reversible_layers_is_not_taken_for_that_of_plain_ones(model, instructions, tmp_path, capsys):
    flags = ["--reversible", "centred", "--adapter_rank", "0", "--lora_r", "2", "--eval_split", "train[:10]", "--learning_rate", "0.05"]
    flags += AT_A_TIME
    assert main(["train", *arguments(None, model, instructions, *flags)]) == 0
    after = summary(tmp_path)["held_out_loss"][1]
    data, prompt = ("--dataset", str(instructions), "--dataset_split", "train[:10]"), ("--prompt", "name", "--max_new_tokens", "1")
    twice = ("--model", "out", "--reversible_adapters", "out")
    for command, *more in (("evaluate", *data), ("generate", *prompt)):
        capsys.readouterr()
        assert main([command, "--model", "out", *more]) == 2
        assert " ".join(twice) in capsys.readouterr().err
        assert main([command, *twice, *more]) == 0
    assert measured(*twice, *data)["loss"] == pytest.approx(after, rel=1e-6)
    assert main(["merge", "--model", "out", "--output_dir", "plain"]) == 2
    (tmp_path / "out" / "reversible_config.json").unlink()
    assert measured("--model", "out", *data)["loss"] != pytest.approx(after, rel=1e-6)  # as plain layers they compute something else


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], {"model_name_or_path", "dataset_name"}),
        (
            ["--model", "m", "--dataset", "d", "--max_eval_rows", "0", "--per_device_eval_batch_size", "0"],
            {"max_eval_rows", "per_device_eval_batch_size"},
        ),
        (["--model", "m", "--dataset", "d", "--reversible_adapters", "absent"], {"reversible_adapters"}),
    ],
)
def test_settings_that_cannot_work(flags, named):
    with pytest.raises(ConfigError) as raised:
        evaluate.parse(flags)
    assert {problem.partition(":")[0] for problem in raised.value.problems} == named


# --- tasks of lm-eval


def scored(tmp_path, folder, *flags) -> dict:
    """What is written of the task `mine`."""
    assert main(["evaluate", *map(str, flags), "--tasks", "mine", "--tasks_folder", str(folder), "--out", str(tmp_path / "s.json")]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((tmp_path / "s.json").read_text())["results"]["mine"]


@pytest.mark.parametrize("way", ["all", "lora", "reversible"])
def test_tasks_are_scored_on_every_kind_of_folder(way, model, tmp_path, capsys, monkeypatch):
    """What was trained scores otherwise than what it was trained from, and as it did when its training ended."""
    pytest.importorskip("lm_eval")
    if way != "all":  # once it is as users have it
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip, which takes a second
    folder = task_folder(tmp_path / "tasks", "mine", rows=questions("piqa", 40, 1))
    files = question_files(tmp_path, "piqa")
    flags = {"all": [], "lora": ["--lora_r", "8"], "reversible": REVERSIBLE}[way]
    learning = ["--learning_rate", "1e-2", "--num_train_epochs", "6", "--use_cpu", "--disable_tqdm", "true"]
    assert main(["qa", "--task_name", "piqa", "--model", str(model), *files, *learning, *flags]) == 0
    trained = ["--model", model, "--reversible_adapters", "out"] if way == "reversible" else ["--model", "out"]
    before, after = scored(tmp_path, folder, "--model", model), scored(tmp_path, folder, *trained)
    assert after["acc,none"] == summary(tmp_path)["held_out_scores"]["acc"][1] > before["acc,none"] + 2 * before["acc_stderr,none"]
    assert "|mine" in capsys.readouterr().out


def test_a_flag_without_effect_is_an_error():
    with pytest.raises(ConfigError, match=r"label_column has no effect with task=causal_lm.*Leave it out\."):
        evaluate.parse(["--model", "m", "--dataset", "d", "--task", "causal_lm", "--label_column", "y"])
    assert evaluate.parse(["--model", "m", "--dataset", "d", "--label_column", "y"]).data.label_column == "y"


def test_a_folder_of_reversible_adapters_is_no_model(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reversible_config.json").write_text("{}")
    assert main(["evaluate", "--model", "out", "--tasks", "mine"]) == 2
    assert "--reversible_adapters out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, named",
    [
        (
            ["--tasks", "a,b", "--dataset", "d", "--max_eval_rows", "3", "--text_column", "t"],
            ["dataset_name", "max_eval_rows", "text_column"],
        ),
        (["--tasks", ","], ["tasks"]),
        (["--tasks", "a", "--limit", "0", "--num_fewshot", "-1", "--out", "s.png"], ["limit", "num_fewshot", "out"]),
        (["--tasks", "a", "--tasks_folder", "absent"], ["tasks_folder"]),
        (["--dataset", "d", "--limit", "3", "--tasks_folder", "t"], ["limit", "tasks_folder"]),
    ],
)
def test_tasks_and_data_exclude_each_other(flags, named):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError) as raised:
        evaluate.parse(["--model", "m", *flags])
    assert sorted(problem.partition(":")[0] for problem in raised.value.problems) == named
    assert evaluate.parse(["--model", "m", "--tasks", "a,b", "c"]).tasks.names == ["a", "b", "c"]
