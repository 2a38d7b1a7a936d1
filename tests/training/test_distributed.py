"""Two processes on one global batch learn what one process learns from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import distributed_script
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference
from tests.support.two_processes import found_by_two

EXACT = RELATIVE[torch.float64]
FLOWN = [
    ("accumulated after a preflight", "accumulated"),
    ("lora after a preflight", "checkpointed"),
    ("streamed after a preflight", "streamed"),
]
ALONE = [name for name in distributed_script.CASES if name not in dict(FLOWN)]  # which learn, bit for bit, what another case learns


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found, and where."""
    return found_by_two(tmp_path_factory, "distributed")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {name: distributed_script.run_case(name, folder, 1) for name in ALONE}, folder


def worst_step(found, expected) -> float:
    assert len(found["gradients"]) == len(expected["gradients"]) == 2
    return max(worst_difference(*pair) for pair in zip(found["gradients"], expected["gradients"]))


@pytest.mark.parametrize("case", [name for name in ALONE if name != "own mean"])
def test_two_processes_learn_what_one_learns(two_processes, one_process, case):
    found, expected = two_processes[0][case], one_process[0][case]
    llama = case.startswith(("lora", "checkpointed"))  # whose norms are float32 whatever the model is
    assert worst_step(found, expected) <= (FLOAT32_INSIDE if llama else EXACT)
    # BERT's loss is the mean of a call: 0 / 0 without a label, in the first step, which transformers leaves out of each process's log
    first = 1 if case in ("logits", "head with bias") else 0
    assert found["losses"][first:] == pytest.approx(expected["losses"][first:], rel=FLOAT32_INSIDE)
    assert found["seeking"] is None


def test_a_mean_of_each_process_is_another_gradient(two_processes, one_process):
    """Sibling: average_tokens_across_devices=False asks for the mean of two means, and the comparison sees that."""
    assert worst_step(two_processes[0]["own mean"], one_process[0]["own mean"]) > NOTICED


@pytest.mark.parametrize("flown, plain", FLOWN)
def test_a_preflight_of_two_processes_is_taken_back(two_processes, flown, plain):
    ours, theirs = two_processes[0][flown], two_processes[0][plain]
    assert ours["losses"] == theirs["losses"] and ours["seeking"] is None
    for one, other in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_write_the_scores_that_one_writes(two_processes, one_process):
    files = [list(Path(folder, "cache").glob("*.safetensors")) for folder in (two_processes[1], one_process[1])]
    assert [len(found) for found in files] == [1, 1]
    assert files[0][0].name == files[1][0].name
    ours, theirs = (load_file(found[0]) for found in files)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values)
