"""Streamed on two processes: what one process learns, with one synchronisation a step however many chunks each of them has."""

import os
import subprocess
import sys

import pytest
import torch

from tests.methods.twin import worst_difference
from tests.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.training import streaming_script

EXACT = RELATIVE[torch.float64]
EXACT_CASES = ["whole", "accumulated", "checkpointed", "lora", "seeking", "skip", "skip accumulated"]
ROW_CASES = ["classifier", "classifier checkpointed"]
PLAIN_CASES = ["whole", "accumulated", "own mean", "checkpointed", "lora", *ROW_CASES]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, streaming_script.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(folder / "found.pt", weights_only=True)
    assert found.pop("processes") == 2
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {name: streaming_script.run_case(name, folder, 1) for name in [*EXACT_CASES, "own mean"]}


def worst_step(found, expected) -> float:
    assert len(found["gradients"]) == len(expected["gradients"]) == 2
    return max(worst_difference(*pair) for pair in zip(found["gradients"], expected["gradients"]))


@pytest.mark.parametrize("case", EXACT_CASES)
def test_two_processes_learn_what_one_learns(two, one, case):
    assert worst_step(two[case], one[case]) <= (FLOAT32_INSIDE if case == "lora" else EXACT)  # Llama's norms are float32
    assert two[case]["losses"] == pytest.approx(one[case]["losses"], rel=1e-6)


def test_a_mean_of_each_process_is_another_gradient(two, one):
    """Sibling: average_tokens_across_devices=False asks for the mean of two means, and the comparison sees that."""
    assert worst_step(two["own mean"], one["own mean"]) > NOTICED


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_two_processes_learn_what_two_learn_plainly(two, case):
    """For one loss a row this is the rule of transformers, which depends on the number of processes."""
    assert worst_step(two[case], two[case]["plain"]) <= (EXACT if case in ROW_CASES else FLOAT32_INSIDE)
    assert two[case]["losses"] == pytest.approx(two[case]["plain"]["losses"], rel=FLOAT32_INSIDE)


def test_fewer_tokens_are_noticed(two):
    assert worst_step(two["seeking"], two["seeking"]["plain"]) > NOTICED


@pytest.mark.parametrize("case", [name for name in streaming_script.CASES if name != "careless"])
def test_processes_synchronise_once_a_step(two, case):
    """As often as in plain training, whatever the number of turns."""
    assert two[case]["reductions"] == two[case]["plain"]["reductions"] == [1, 1]
    assert max(map(sum, two[case]["turns"])) > 4


def test_a_synchronisation_in_every_turn_is_counted(two):
    assert two["careless"]["turns"] == [(4, 4)] * 2
    assert two["careless"]["reductions"] == [4, 4] and two["careless"]["plain"]["reductions"] == [1, 1]


def test_processes_had_different_numbers_of_chunks(two):
    assert two["whole"]["turns"] == [(1, 4), (4, 1)]
    assert two["classifier"]["turns"] == [(2, 5, 5, 2)] * 2
    assert two["skip"]["turns"][0][0] < two["skip"]["turns"][1][0] == 4  # as long, but nothing to learn in its later chunks


def test_a_sharded_model_learns_what_a_whole_one_does(two):
    found = two["sharded"]
    assert worst_difference(found["last turn alone"], found["plain"]) <= EXACT
    assert worst_difference(found["every turn"], found["plain"]) <= EXACT
    assert worst_difference(two["whole"]["gradients"][0], found["plain"]) > NOTICED
