"""The command line: `hf-memtune train ...`, `hf-memtune evaluate ...`, and others. One file a command, imported when it is called."""

import difflib
import os
import select
import sys
from importlib import import_module

COMMANDS = {
    "train": "fine-tune a model, from a recipe in configs/ and flags",
    "estimate": "predict the memory of a training step, without a GPU, weights or data",
    "plan": "find settings with which training fits a memory budget, and write them as a recipe",
    "longest": "find the longest row, and the largest batch, that fit a memory budget",
    "evaluate": "measure the loss of a model or of reversible adapters, or their scores on tasks of lm-eval",
    "generate": "continue prompts with a model, and with reversible adapters that were trained on it",
    "merge": "add LoRA adapters to the weights of their model, and write a plain model",
    "glue": "fine-tune an encoder on a task of GLUE, or on sentences and labels of your own",
    "qa": "fine-tune a language model on one of five question-answering tasks, and score it by lm-eval",
    "tokens": "show which tokens of an example are scored how and kept, as a page and a picture",
}

_USAGE = """usage: hf-memtune COMMAND [ARGUMENTS]

{commands}

hf-memtune COMMAND --help shows the settings that matter, --help-all every one.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for settings, models or data that cannot be used, or 1 where nobody reads on (`| head`)."""
    try:
        try:
            return _command(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout):  # it is of something else, such as a connection
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more when it ends
        return 1


def _is_closed(stream) -> bool:
    """Whether a stream goes to somebody who reads no more."""
    try:
        number = stream.fileno()
    except OSError:  # it is no file
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def _command(arguments: list[str] | None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        from hf_memtune import __version__

        print(f"hf_memtune {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"error: no command {name!r}.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(rest):
        from hf_memtune.cli.help import page

        print(page(name))
        return 0
    return _run(name, rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return _USAGE.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()))


def _run(name: str, arguments: list[str]) -> int:
    from hf_memtune.cli.quiet import quiet
    from hf_memtune.errors import MemTuneError

    try:
        with quiet():
            import_module(f"hf_memtune.cli.{name}").run(arguments)
    except MemTuneError as error:  # the message says what to do, a traceback would bury it
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
