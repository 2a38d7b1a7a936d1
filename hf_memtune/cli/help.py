"""The pages of `--help`, drawn without loading anything heavy."""

import shutil
import textwrap

from hf_memtune.cli.essentials import MUST, PAGES, Line

WIDEST_FLAG = 34  # characters; a longer flag gets a line of its own


def page(command: str) -> str:
    """The settings of a command that matter, as text for the width of the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    about = PAGES[command]
    lines = [f"usage: hf-memtune {command} {about.usage}", "", *textwrap.wrap(about.about, width)]
    for title, settings in about.groups:
        lines += ["", f"{title}:"]
        for setting in settings:
            lines += _drawn(setting, width)
    return "\n".join([*lines, "", f"hf-memtune {command} --help-all lists every setting."])


def _drawn(setting: Line, width: int) -> list[str]:
    """A setting in two columns: `  --max_length TOKENS    longest row; the rest is cut off [1024]`."""
    flag = f"  --{setting.flag} {setting.value}".rstrip()
    indent = " " * (WIDEST_FLAG + 2)
    text = textwrap.wrap(setting.says + _default(setting), width, initial_indent=indent, subsequent_indent=indent)
    if len(flag) > WIDEST_FLAG:
        return [flag, *text]
    return [flag.ljust(len(indent)) + text[0].lstrip(), *text[1:]]


def _default(setting: Line) -> str:
    """In brackets. A switch is off unless it is given, which needs no word."""
    if setting.default is MUST:
        return " (required)"
    if setting.default is None or setting.default is False:
        return ""
    return f" [{_plain(setting.default)}]"


def _plain(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
