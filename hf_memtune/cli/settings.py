"""From a recipe and flags to settings: a YAML file first, flags over it, every problem reported at once.

The YAML file goes through the same parser as the flags, so that a key means what the flag of its name means.
"""

import argparse
import difflib
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml
from transformers import HfArgumentParser

from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import no_effect, told

NOTHING = ("", "null", "~")
SHORTER = ("--model", "--dataset", "--budget")  # aliases by which help calls a setting
COMMAND_LINE = "the command line"


class Piece(NamedTuple):
    """One flag with its values, or one YAML key turned into them. dest: the setting it is for; origin: where it stands."""

    dest: str
    arguments: list[str]
    origin: str


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each setting under one spelling. Shows defaults, but not None beside a text that says what no value stands for."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = [flag for flag in action.option_strings if flag.startswith("--")]
        flag = next((flag for flag in flags if flag in SHORTER), flags[0])
        return f"{flag} {self._value(action)}".rstrip()

    def _value(self, action: argparse.Action) -> str:
        """What stands for the value: its choices, or its type. A switch takes none."""
        if action.choices:
            return "{" + ",".join(map(str, action.choices)) + "}"
        if action.nargs in (0, "?"):
            return ""
        kind = {int: "N", float: "X"}.get(action.type, "VALUE")
        return f"{kind} ..." if action.nargs in ("+", "*") else kind

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None and "Default: " in (action.help or "")
        return action.help if said else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Parses dataclasses piece by piece, and remembers which settings were given."""

    def __init__(self, kinds: list[type], **options):
        super().__init__(kinds, allow_abbrev=False, exit_on_error=False, formatter_class=Help, **options)
        self.problems: list[str] = []
        self.given: set[str] = set()
        self.flags: set[str] = set()  # those of `given` that stand on the command line
        self._twins: dict[str, str] = {}
        self.unlist({action.dest for action in self._actions if action.option_strings[0].startswith("--no_")}, only_negations=True)

    def error(self, message: str):
        raise argparse.ArgumentError(None, message)  # argparse would exit at the first problem

    def unlist(self, names: set[str], only_negations: bool = False) -> None:
        """Leave settings out of `--help-all`. only_negations: not the settings, but `--no_name`, their second spelling."""
        for action in self._actions:
            if action.dest in names and (not only_negations or action.option_strings[0].startswith("--no_")):
                action.help = argparse.SUPPRESS

    def takes_several(self, name: str) -> None:
        """Let a flag be given several values, which then are a list."""
        self._option_string_actions[f"--{name}"].nargs = "+"

    def may_stand_alone(self, name: str, value, typed) -> None:
        """Let a flag be given without a value, which then is `value`. typed: makes a value of a word."""
        action = self._option_string_actions[f"--{name}"]
        action.nargs, action.const, action.type = "?", value, typed

    def one_setting(self, name: str, other: str) -> None:
        """Two names of one setting: what is given last under either counts."""
        self._twins |= {name: other, other: name}

    def read(self, arguments: list[str], with_recipe: bool) -> Namespace:
        """Values of all settings; `problems`, `given` and `flags` are filled in. `--help-all` prints and exits."""
        if "--help-all" in arguments:
            self.print_help()
            self.exit()
        namespace = self.parse_args([])
        for piece in self._pieces(recipe_first(arguments) if with_recipe else arguments, with_recipe):
            self._take(piece, namespace)
        return namespace

    def _pieces(self, arguments: list[str], with_recipe: bool) -> Iterator[Piece]:
        first_flag = next((n for n, word in enumerate(arguments) if word.startswith("--")), len(arguments))
        recipes = arguments[: min(first_flag, 1)] if with_recipe else []
        wanted = "a flag (--name value) or one YAML file, first" if with_recipe else "a flag (--name value)"
        self.problems += [f"{word}: expected {wanted}." for word in arguments[len(recipes) : first_flag]]
        for recipe in recipes:
            yield from self._recipe(Path(recipe))
        bounds = [n for n, word in enumerate(arguments) if word.startswith("--")] + [len(arguments)]
        for start, end in pairwise(bounds):
            flag = arguments[start].partition("=")[0]
            action = self._option_string_actions.get(flag)
            yield Piece(action.dest if action else flag[2:], arguments[start:end], COMMAND_LINE)

    def _recipe(self, path: Path) -> Iterator[Piece]:
        """The settings of a YAML file. Scalars stay text, which the parser types: 5e-4 is a number, `no` no boolean by itself."""
        try:
            text = path.read_text(encoding="utf-8")
            node, typed = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as error:
            self.problems.append(f"{path}: not a YAML file that can be read: {error}")
            return
        if typed is not None and not isinstance(typed, dict):
            self.problems.append(f"{path}: got a {type(typed).__name__}, expected lines of `name: value`.")
            return
        seen: set[str] = set()
        for key, value in node.value if typed else []:
            if key.value in seen:
                self.problems.append(f"{key.value}: given twice in {path} (line {key.start_mark.line + 1}). Keep one.")
            seen.add(key.value)
            if self._is_null(value):
                self._keep_default(key.value, str(path))
            else:
                yield Piece(key.value, _words(key.value, value, typed.get(key.value)), str(path))

    def _is_null(self, node: yaml.Node) -> bool:
        return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NOTHING

    def _keep_default(self, name: str, origin: str) -> None:
        if f"--{name}" not in self._option_string_actions:
            self._unknown(name, origin)
        elif self.get_default(name) is not None:
            self.problems.append(f"{name}: got nothing in {origin}, expected a value; leave the line out for the default.")

    def _take(self, piece: Piece, namespace: Namespace) -> None:
        if piece.arguments[0].partition("=")[0] not in self._option_string_actions:
            self._unknown(piece.dest, piece.origin)
            return
        try:
            _, left = self.parse_known_args(piece.arguments, namespace)
        except argparse.ArgumentError as error:
            self.problems.append(f"{piece.dest}: {error.message} ({piece.origin}).")
            return
        if (twin := self._twins.get(piece.dest)) is not None:
            setattr(namespace, twin, self.get_default(twin))
        self.given.add(piece.dest)
        if piece.origin == COMMAND_LINE:
            self.flags.add(piece.dest)
        if left:
            self.problems.append(f"{piece.dest}: takes one value, so {' '.join(left)!r} is left over ({piece.origin}).")

    def _unknown(self, name: str, origin: str) -> None:
        known = sorted({flag[2:] for flag in self._option_string_actions if flag.startswith("--")})
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else " --help-all lists all settings."
        self.problems.append(f"{name}: no such setting ({origin}).{hint}")


def recipe_first(arguments: list[str]) -> list[str]:
    """`--config FILE`, or `--config=FILE`, in the place where a recipe stands."""
    arguments = [word for given in arguments for word in (given.split("=", 1) if given.startswith("--config=") else [given])]
    if "--config" not in arguments[:-1]:
        return arguments
    at = arguments.index("--config")
    return [arguments[at + 1], *arguments[:at], *arguments[at + 2 :]]


def _words(name: str, node: yaml.Node, typed) -> list[str]:
    """A YAML value as the words of a command line."""
    if isinstance(node, yaml.ScalarNode):
        return [f"--{name}={node.value}"]
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [f"--{name}", *(item.value for item in node.value)]
    return [f"--{name}={json.dumps(typed)}"]


def build(kind: type, values: dict, problems: list[str]):
    """An instance of a dataclass, or None with its problems added."""
    try:
        with told():  # by `idle_flags`
            settings = kind(**values)
        found = settings.problems()
    except ConfigError as error:
        found = error.problems
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks of its training arguments
        found = [str(error)]
    problems += [message for message in found if message not in problems]
    return settings if not found else None


def idle_flags(built: Iterable, parser: Parser, more: Mapping[str, str] = MappingProxyType({})) -> tuple[list[str], list[str]]:
    """What settings say has no effect: that of flags as problems, and all of it for warnings. None among `built` could not be built.

    more: what else was found to have none, with the reason.
    """
    idle = dict(more)
    for part in built:
        idle |= {} if part is None else part.ineffective()
    said = {name: no_effect(name, reason) for name, reason in idle.items()}
    return [f"{message}. Leave it out." for name, message in said.items() if name in parser.flags], list(said.values())


def values_of(kind: type, namespace: Namespace) -> dict:
    """The fields of a dataclass, from a namespace that has them."""
    return {f.name: getattr(namespace, f.name) for f in fields(kind) if f.init}
