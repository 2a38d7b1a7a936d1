"""What two processes find that run several scripts one after the other, for the test files of each of them.

One launch serves all: three interpreters that import take longer than what most of the scripts do.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from pytest import TempPathFactory

from tests.support import distributed_script, launched, patience, sharing_script, streaming_script

SCRIPTS = {"sharing": sharing_script, "distributed": distributed_script, "streaming": streaming_script}
# --multi_gpu is accelerate's word for several processes, and its --cpu starts a single one; the scripts themselves ask for CPUs
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]
FAULTS = ("Fatal Python error", "terminate called", "Traceback (most recent call last)")


def found_by_two(factory: TempPathFactory, name: str) -> tuple[dict, Path]:
    """What a script's process 0 left, and the folder where. The first who asks launches them; another worker of xdist waits for that."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    ended = root / "two.json"
    with FileLock(root / "two.lock"):
        if not ended.exists():
            ended.write_text(json.dumps(launch(lambda folder: [*LAUNCH, *_all_scripts(folder)], root / "two")))
    status, errors, folder = json.loads(ended.read_text())
    assert status == 0, errors
    found = torch.load(Path(folder) / name / "found.pt", weights_only=True)
    assert found.pop("processes") == 2
    return found, Path(folder) / name


def launch(arguments_in: Callable[[Path], list[str]], folder: Path) -> tuple[int, str, str]:
    """`accelerate launch` with the arguments of a run in a folder: the exit status, what was said from the first fault on, and the folder.

    A process that native code has aborted (gloo did, once in some dozens of runs, and left no trace) is no answer to what is tested: such
    a launch is made once more, in a folder of its own, with a warning that says where it was.
    """
    status, errors = _launch(arguments_in, folder)
    if "SIGABRT" in errors:
        warnings.warn(f"two processes were launched again, since one was aborted: {errors}", stacklevel=2)
        folder = folder.with_name(f"{folder.name}_again")
        status, errors = _launch(arguments_in, folder)
    return status, errors, str(folder)


def _launch(arguments_in: Callable[[Path], list[str]], folder: Path) -> tuple[int, str]:
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments_in(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience.PROGRAM, check=False)
    said = done.stderr
    first = min((place for fault in FAULTS if (place := said.find(fault)) >= 0), default=0)
    return done.returncode, said[first : first + 6000] + said[first + 6000 :][-3000:] if done.returncode else ""


def _all_scripts(folder: Path) -> list[str]:
    """The arguments that run each of them in a folder of its own."""
    for name in SCRIPTS:
        (folder / name).mkdir()
    commands = folder / "commands.json"
    commands.write_text(json.dumps([[script.__file__, str(folder / name)] for name, script in SCRIPTS.items()]))
    return [launched.__file__, str(commands)]
