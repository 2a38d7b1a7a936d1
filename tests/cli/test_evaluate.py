"""`hf-memtune evaluate`: the loss that training measures, of the model and of adapters that were trained on it."""

import pytest

from hf_memtune.cli import evaluate, main
from hf_memtune.errors import ConfigError
from tests.support.train import REVERSIBLE, arguments, summary


def measured(*flags):
    return evaluate.measured(evaluate.parse([str(flag) for flag in flags]))


def test_the_loss_is_that_of_training(model, instructions, tmp_path, capsys):
    held_out = ["--eval_split", "train[:10]", "--learning_rate", "0.05"]
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
