"""The commands: help, errors and exit status."""

import pytest

from hf_memtune.cli import COMMANDS, main
from tests.support.folders import ROOT, in_new_process

LIGHT = """
import sys
from hf_memtune.cli import main
main(["--help"])
heavy = {"torch", "transformers", "datasets", "rich", "yaml", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_lists_every_command_and_loads_nothing_heavy():
    done = in_new_process("-c", LIGHT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_no_command_is_help(capsys):
    assert main([]) == 0
    assert "hf-memtune COMMAND" in capsys.readouterr().out


def test_version(capsys):
    from hf_memtune import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hf_memtune {__version__}"


PIPE = """
import os, sys
from hf_memtune.cli import main
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(writing)
os.close(reading)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"], ["merge", "--help-all"]])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_reader_that_goes_away_is_no_error(arguments, buffers, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffers else "1")
    done = in_new_process("-c", PIPE, *arguments, cwd=ROOT)
    by_argparse = arguments[-1] == "--help-all" and not buffers  # which in some Pythons says nothing of it
    assert done.stderr == "" and done.returncode in ([0, 1] if by_argparse else [1])


def test_a_connection_that_breaks_is_one(monkeypatch):
    def broken(name, arguments):
        raise BrokenPipeError("of a tracker")

    monkeypatch.setattr("hf_memtune.cli._run", broken)
    with pytest.raises(BrokenPipeError, match="of a tracker"):
        main(["train"])


def test_an_unknown_command_names_the_closest(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, expected",
    [
        ("train", ["--token_ratio", "--lora_r", "--dataset", "--learning_rate"]),
        ("glue", ["--lora_r", "--task_name", "--train_file", "--reversible"]),
        ("tokens", ["--token_ratio", "--index", "--text"]),
        ("estimate", ["--sequence_length", "--config_overrides", "--lora_r"]),
        ("plan", ["--budget", "--allow_approximate", "--out", "--lora_r"]),
        ("merge", ["--model", "--output_dir", "--base_model"]),
    ],
)
def test_help_of_a_command_lists_its_settings(command, expected, capsys):
    assert main([command, "--token_ratio", "0.2", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in expected)


def test_every_setting_of_the_commands_has_a_help_text():
    from hf_memtune.cli import tokens, train

    for parser in (train.make_parser(), tokens.make_parser()):
        assert not [action.dest for action in parser._actions if not action.help]


def test_an_error_is_a_message_and_not_a_traceback(capsys):
    assert main(["train", "--token_rati", "0.2"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "Did you mean token_ratio?" in shown and "Traceback" not in shown


@pytest.mark.parametrize("model", ["absent-folder/model"])
def test_a_model_that_does_not_exist(model, instructions, capsys):
    assert main(["train", "--model", model, "--dataset", str(instructions)]) == 2
    assert "model_name_or_path" in capsys.readouterr().err
