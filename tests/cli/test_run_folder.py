"""What `hf-memtune train` leaves behind and shows: a folder that can be moved, a model card, readable log lines, no noise."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from hf_memtune.cli import main
from hf_memtune.cli.arguments import DataSource, ModelSource
from hf_memtune.cli.checks import why_unwritable
from hf_memtune.cli.model import load_on_device, load_tokenizer, slow_dtype
from hf_memtune.cli.quiet import quiet

SHORT = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --use_cpu --disable_tqdm true".split()


class Weights:
    """What is asked of a model: the dtype of its weights."""

    def __init__(self, dtype: str):
        self.dtype = getattr(torch, dtype)


def arguments(model, data, *more: str) -> list[str]:
    return ["--model", str(model), "--dataset", str(data), *SHORT, *more]


def test_the_run_folder_says_how_it_was_trained(model, instructions, tmp_path):
    from huggingface_hub import ModelCard

    flags = ["--token_seeking", "--token_ratio", "0.5", "--lora_r", "2"]
    assert main(["train", *arguments(model, instructions, *flags)]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    for words in (
        "LoRA of rank 2",
        "| memory settings | token_seeking, token_ratio=0.5, token_gradient=cut |",
        "instructions.jsonl: ",
        "optimizer steps | 2",
        "peak memory | ",
        "held-out loss | ",
    ):
        assert words in card.text
    assert "More Information Needed" not in card.text and str(tmp_path) not in card.content
    assert card.data.library_name == "peft" and "hf_memtune" in card.data.tags


def test_the_readme_of_somebody_else_is_left_alone(model, instructions, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine\n")
    assert main(["train", *arguments(model, instructions)]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"


def test_log_lines_are_readable_and_metrics_keep_bytes(model, instructions, tmp_path, capsys):
    assert main(["train", *arguments(model, instructions, "--logging_steps", "1")]) == 0
    shown = capsys.readouterr().out
    assert "'peak_memory': '" in shown and "iB'" in shown and "_bytes" not in shown
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any(isinstance(entry.get("peak_memory_bytes"), int) for entry in history)


def test_the_model_is_saved_before_anything_is_reported(model, instructions, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no picture")

    monkeypatch.setattr("hf_memtune.training.care.report.memory_report.MemoryReportCallback.write", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        main(["train", *arguments(model, instructions, "--save_strategy", "no")])
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_no_warning_that_the_user_can_do_nothing_about(model, instructions, monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["train", *arguments(model, instructions, "--lora_r", "2")]) == 0
        assert caught == []
        with monkeypatch.context() as patch:
            patch.setattr("hf_memtune.cli.quiet.HIDDEN", ())
            assert main(["train", *arguments(model, instructions, "--lora_r", "2")]) == 0
    assert any("deprecated" in str(warning.message) for warning in caught)  # there is something to hide


def test_a_warning_for_the_user_is_shown_without_code():
    before = warnings.filters[:], warnings.formatwarning
    with quiet():
        assert warnings.formatwarning("lora_alpha has no effect", UserWarning, "file.py", 3) == "warning: lora_alpha has no effect\n"
    assert (warnings.filters[:], warnings.formatwarning) == before


def test_a_run_folder_can_be_moved_and_resumed(model, instructions, tmp_path):
    """Nothing in it says where it was, the best checkpoint included, but for the base model of LoRA, which lies elsewhere."""
    flags = "--lora_r 2 --save_steps 1 --eval_strategy steps --eval_steps 1 --load_best_model_at_end true --save_strategy steps".split()
    assert main(["train", *arguments(model, instructions, *flags, "--output_dir", str(tmp_path / "run"))]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    best = json.loads((tmp_path / "moved" / "checkpoint-2" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best.startswith(str(tmp_path / "run"))  # as transformers has it
    more = [*flags, "--max_steps", "3", "--learning_rate", "0", "--output_dir", "moved", "--resume_from_checkpoint"]
    assert main(["train", *arguments(model, instructions, *more)]) == 0
    best = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best == "moved/checkpoint-2"


def test_scores_of_a_moved_run_are_found_beside_it(model, instructions, tmp_path, capsys):
    flags = "--token_seeking --seek_schedule epoch --token_scorer context --save_steps 1 --save_strategy steps".split()
    assert main(["train", *arguments(model, instructions, *flags, "--output_dir", str(tmp_path / "run"))]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    more = [*flags, "--max_steps", "3", "--output_dir", str(tmp_path / "moved"), "--resume_from_checkpoint"]
    assert main(["train", *arguments(model, instructions, *more)]) == 0
    for file in (tmp_path / "moved").glob("seek-epoch-*"):
        file.unlink()
    more[more.index("3")] = "4"
    assert main(["train", *arguments(model, instructions, *more)]) == 2
    assert "which is gone" in capsys.readouterr().err


def test_lora_of_a_relative_base_is_used_from_another_folder(model, instructions, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    (tmp_path / "base").symlink_to(model)
    assert main(["train", *arguments("base", instructions, "--lora_r", "2")]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    AutoModelForCausalLM.from_pretrained("../out")


def test_what_is_no_text_model_is_said_in_one_line(instructions, tmp_path, capsys):
    from transformers import ViTConfig, ViTForImageClassification

    from tests.support.folders import tokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained("vision")
    assert main(["train", *arguments("vision", instructions)]) == 2
    assert "the folder 'vision' holds no tokenizer" in capsys.readouterr().err
    tokenizer().save_pretrained("vision")
    assert main(["train", *arguments("vision", instructions)]) == 2
    shown = capsys.readouterr().err
    _, _, message = shown.partition("error: 1 problem with the settings:\n")
    assert "model of the type vit" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("dtype, has_units, said", [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)])
def test_a_dtype_that_the_cpu_has_no_units_for_is_said(dtype, has_units, said, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units)
    message = slow_dtype(Weights(dtype), torch.device("cpu"))
    assert (message is not None and "--dtype float32" in message) == said
    assert slow_dtype(Weights(dtype), torch.device("meta")) is None


def test_a_model_that_is_only_looked_at_is_slow_in_it_too(model, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for dtype in ("float32", "bfloat16"):
        source = ModelSource(model_name_or_path=str(model), dtype=dtype)
        load_on_device(source, DataSource(task="causal_lm", max_length=8), load_tokenizer(source))
        assert any("--dtype float32" in str(each.message) for each in recwarn) == (dtype == "bfloat16")


def test_a_folder_that_would_hold_two_models_is_refused(model, instructions, tmp_path, capsys):
    assert main(["train", *arguments(model, instructions, "--lora_r", "2")]) == 0
    assert main(["train", *arguments(model, instructions)]) == 2
    assert "holds what another kind of run has saved (adapter_config.json)" in capsys.readouterr().err
    assert main(["train", *arguments(model, instructions, "--lora_r", "2")]) == 0


def test_the_folder_of_the_model_is_no_output_dir(model, instructions, capsys):
    before = sorted(path.name for path in model.iterdir())
    for more in ([], ["--lora_r", "2"]):
        assert main(["train", *arguments(model, instructions, "--output_dir", str(model), *more)]) == 2
        assert "is the folder of the model that is trained" in capsys.readouterr().err
    assert main(["train", *arguments(model, instructions, "--output_dir", str(instructions))]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize("command", ["train", "merge"])
@pytest.mark.parametrize(
    "where, why",
    [
        pytest.param(
            "/proc/run/out",
            "nothing can be written into '/proc'",
            marks=pytest.mark.skipif(not os.path.ismount("/proc"), reason="no /proc"),
        ),
        ("notes/run/out", "notes' is no folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    command, where, why, model, instructions, tmp_path, capsys, monkeypatch
):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr("hf_memtune.cli.train.make_trainer", pytest.fail)
    flags = arguments(model, instructions) if command == "train" else ["--model", str(model)]
    assert main([command, *flags, "--output_dir", where]) == 2
    assert why in capsys.readouterr().err


def test_a_folder_is_made_where_one_can_be(tmp_path, monkeypatch):
    assert why_unwritable(tmp_path / "a" / "b") is None and why_unwritable(Path("a/b")) is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert why_unwritable(tmp_path / "a" / "b") == f"nothing can be written into {str(tmp_path)!r}"
