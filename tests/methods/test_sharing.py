"""Two processes, under DDP and FSDP2 on gloo, find the gradients that one finds on all rows."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support import patience, sharing_script
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference

FLOAT32_NORMS = ("llama",)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, sharing_script.__file__, str(folder)]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=patience.PROGRAM)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)[-4000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", sharing_script.CASES)
def test_two_processes_find_what_one_finds(two_processes, case):
    whole = sharing_script.gradients(case, slice(None), 1)
    allowed = FLOAT32_INSIDE if sharing_script.CASES[case][1] in FLOAT32_NORMS else RELATIVE[torch.float64]
    assert whole.keys() == two_processes[case].keys()
    assert worst_difference(two_processes[case], whole) <= allowed
    assert worst_difference(sharing_script.gradients(case, slice(0, 2), 1), whole) > NOTICED
