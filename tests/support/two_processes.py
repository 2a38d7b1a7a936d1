"""What two processes find that run several scripts one after the other, for the test files of each of them.

One launch serves all: three interpreters that import take longer than what most of the scripts do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock
from pytest import TempPathFactory

from tests.support import distributed_script, launched, patience, sharing_script, streaming_script

SCRIPTS = {"sharing": sharing_script, "distributed": distributed_script, "streaming": streaming_script}
# --multi_gpu is accelerate's word for several processes, and its --cpu starts a single one; the scripts themselves ask for CPUs
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def found_by_two(factory: TempPathFactory, name: str) -> tuple[dict, Path]:
    """What a script's process 0 left, and the folder where. The first who asks launches them; another worker of xdist waits for that."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, ended = root / "two", root / "two.json"
    with FileLock(root / "two.lock"):
        if not ended.exists():
            ended.write_text(json.dumps(_launch(folder)))
    status, errors = json.loads(ended.read_text())
    assert status == 0, errors
    found = torch.load(folder / name / "found.pt", weights_only=True)
    assert found.pop("processes") == 2
    return found, folder / name


def _launch(folder: Path) -> tuple[int, str]:
    """The exit status, and the end of what was said of errors."""
    for name in SCRIPTS:
        (folder / name).mkdir(parents=True)
    commands = folder / "commands.json"
    commands.write_text(json.dumps([[script.__file__, str(folder / name)] for name, script in SCRIPTS.items()]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, launched.__file__, str(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience.PROGRAM, check=False)
    return done.returncode, done.stderr[-6000:]
