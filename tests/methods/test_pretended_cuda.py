"""Methods on a CUDA device that is not there: the same numbers, nothing on the wrong device, kernels called as they want it, few waits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import pretended_cuda
from tests.support.patience import PROGRAM
from tests.support.pretended_run import CASES

TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 3e-2}
ROOT = Path(__file__).parents[2]
CHUNKS = 6  # of a row
WAITS = {  # of the processor for the device in a step: as many with any number of layers
    "streaming by layers": 1, "attention kept": 1, "offloaded": 1, "offloaded by chunks": 1, "packed rows": 3 * CHUNKS, "padded rows by layers": 3 * CHUNKS,
    "padded rows by chunks": 3 * CHUNKS, "token seeking": 6, "two levels": 2, "reversible layers": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    try:
        environment = pretended_cuda.environment(tmp_path_factory.mktemp("device"))
    except RuntimeError as error:
        pytest.skip(f"no device can be pretended here: {error}")
    command = [sys.executable, "-m", "tests.support.pretended_run"]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PROGRAM)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"')]
    return {line.get("case", "refused"): line for line in lines}


def test_a_tensor_on_the_wrong_device_is_refused(found):
    assert "tensors on cuda and on the cpu" in found["refused"]["refused"]


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_cpu(found, name):
    allowed = TOLERANCE[str(CASES[name][2])]
    assert found[name]["loss"] <= allowed and found[name]["gradients"] <= allowed


def test_a_trainer_with_what_is_on_by_itself_on_a_gpu(found):
    losses = found["trainer"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5) and len(losses["cpu"]) == 2


@pytest.mark.parametrize("name", WAITS)
def test_the_processor_seldom_waits(found, name):
    assert sum(found[name]["syncs"].values()) <= WAITS[name], found[name]["syncs"]
