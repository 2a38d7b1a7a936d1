"""`--help`: the settings that matter, which are those of the parsers, shown at once; `--help-all`: every setting that can be used."""

import argparse
import re

import pytest

from hf_memtune.cli import COMMANDS, estimate, evaluate, forecast, generate, glue, longest, main, merge, plan, qa, tokens, train
from hf_memtune.cli.budget import BudgetArguments
from hf_memtune.cli.essentials import MUST, PAGES
from hf_memtune.cli.help import page
from hf_memtune.cli.settings import Parser
from hf_memtune.settings.presets import PRESETS
from tests.support.folders import ROOT, in_new_process

READERS = {
    "train": train.parse, "estimate": estimate.run, "plan": plan.run, "longest": longest.run, "evaluate": evaluate.parse, "generate": generate.parse,
    "glue": glue.parse, "qa": qa.parse, "tokens": tokens.parse, "merge": merge.parse,
}  # fmt: skip
LIGHT = """
import sys
from hf_memtune.cli import COMMANDS, main
for name in COMMANDS:
    assert main([name, "--token_ratio", "0.2", "--help"]) == 0
heavy = {"torch", "transformers", "datasets", "rich", "yaml", "numpy", "peft"} & set(sys.modules)
assert not heavy, heavy
"""


class Caught(Exception):
    pass


@pytest.fixture(scope="module")
def parsers():
    """The parser with which each command reads its flags."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, read in READERS.items():

            def keep(self, *args, name=name, **kwargs):
                found[name] = self
                raise Caught

            patch.setattr(Parser, "read", keep)
            with pytest.raises(Caught):
                read([])
    return found


def same(line, default) -> bool:
    """Whether a line states the default of the parser. Where it states none, the parser has none."""
    if line.default in (None, False, MUST):
        return default in (None, False, [])
    return line.default == default


def action_of(parser, flag):
    return parser._option_string_actions.get(f"--{flag}")


def test_every_command_has_a_page():
    assert set(PAGES) == set(COMMANDS) == set(READERS)


@pytest.mark.parametrize("command", READERS)
def test_a_page_says_what_the_parser_has(command, parsers):
    for _, lines in PAGES[command].groups:
        for line in lines:
            action = action_of(parsers[command], line.flag)
            assert action is not None and action.help is not argparse.SUPPRESS, line.flag
            default = getattr(action.default, "value", action.default)
            assert same(line, default), line.flag
            if "|" in line.value and action.choices:
                assert set(line.value.split("|")) == {getattr(choice, "value", choice) for choice in action.choices if choice}, line.flag


def test_a_page_that_says_something_else_is_seen(parsers):
    """The comparison above has something to compare."""
    line = next(line for _, lines in PAGES["train"].groups for line in lines if line.flag == "max_length")
    assert same(line, 1024) and not same(line, 1025) and not same(line._replace(default=None), 1024)
    assert action_of(parsers["train"], "max_length").default == 1024 != action_of(parsers["glue"], "max_length").default
    assert action_of(parsers["train"], "no_such_setting") is None


@pytest.mark.parametrize("command", READERS)
def test_each_setting_is_shown_once(command):
    flags = re.findall(r"^  --(\w+)", page(command), re.M)
    assert len(flags) == len(set(flags)) <= 40


def test_what_presets_fill_is_stated_as_it_is():
    said = [line.says for _, lines in PAGES["train"].groups for line in lines if line.flag == "token_ratio"]
    assert said == [f"share of the tokens to keep; {PRESETS[None]['token_ratio']}, or that of the preset"]


def test_help_loads_nothing_heavy():
    done = in_new_process("-c", LIGHT, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_all_lists_each_setting_once_and_none_that_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help-all"])
    shown = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", shown, re.M)
    assert ended.value.code == 0 and len(flags) == len(set(flags)) > 100
    assert not {"deepspeed", "torch_compile", "torch_compile_mode", "use_liger_kernel", "do_train", "gradient_checkpointing"} & set(flags)
    assert {"model", "dataset", "budget", "fsdp", "adam_beta1", "context_weight", "memory_report", "use_cache"} <= set(flags)
    assert set(re.findall(r"^  --(\w+)", page("train"), re.M)) <= set(flags)
    assert not [flag for flag in flags if flag.startswith("no_")]


def test_a_setting_has_one_spelling_in_all_commands(parsers):
    """What two commands call by one name is one setting: same kind of value, same aliases."""
    seen = {}
    for command, parser in parsers.items():
        for action in parser._actions:
            if isinstance(action, argparse._StoreAction) and action.dest not in ("model_name_or_path", "task_name"):
                kind = (action.nargs, tuple(action.option_strings))
                assert seen.setdefault(action.dest, kind) == kind, (command, action.dest)
    for command in ("evaluate", "train"):
        assert {"max_eval_rows", "per_device_eval_batch_size"} <= {action.dest for action in parsers[command]._actions}


def test_the_parser_of_a_budget_is_that_of_train():
    assert {a.dest for a in forecast.make_parser("train", BudgetArguments)._actions} >= {"memory_budget", "sequence_length", "lora_r"}
