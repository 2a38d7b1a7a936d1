"""Streamed on two processes: what one process learns, with one synchronisation a step however many chunks each of them has."""

import pytest
import torch

from tests.support import streaming_script
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference
from tests.support.two_processes import found_by_two

EXACT = RELATIVE[torch.float64]
EXACT_CASES = ["whole", "accumulated", "small buckets", "checkpointed", "lora", "hybrid", "seeking", "skip", "skip accumulated"]
OF_CALLS = ["seeking", "skip", "skip accumulated"]  # the mean over kept tokens is that of each call
ROW_CASES = ["classifier", "classifier checkpointed"]
PLAIN_CASES = ["whole", "accumulated", "small buckets", "own mean", "own loss", "checkpointed", "lora", "hybrid", "careless", *ROW_CASES]
FLOAT64 = ["own loss", *ROW_CASES]  # losses that are not taken in float32


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found."""
    return found_by_two(tmp_path_factory, "streaming")[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder, calls_of = tmp_path_factory.mktemp("one"), dict.fromkeys(OF_CALLS, 2)
    return {name: streaming_script.run_case(name, folder, 1, calls_of=calls_of.get(name)) for name in [*EXACT_CASES, "own mean"]}


def worst_step(found, expected) -> float:
    assert len(found["gradients"]) == len(expected["gradients"]) == 2
    return max(worst_difference(*pair) for pair in zip(found["gradients"], expected["gradients"]))


@pytest.mark.parametrize("case", EXACT_CASES)
def test_two_processes_learn_what_one_learns(two, one, case):
    assert worst_step(two[case], one[case]) <= (FLOAT32_INSIDE if case in ("lora", "hybrid") else EXACT)  # Llama's norms are float32
    assert two[case]["losses"] == pytest.approx(one[case]["losses"], rel=FLOAT32_INSIDE)


def test_a_mean_of_each_process_is_another_gradient(two, one):
    """Sibling: average_tokens_across_devices=False asks for the mean of two means, and the comparison sees that."""
    assert worst_step(two["own mean"], one["own mean"]) > NOTICED


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_two_processes_learn_what_two_learn_plainly(two, case):
    """For one loss a row this is the rule of transformers, which depends on the number of processes."""
    assert worst_step(two[case], two[case]["plain"]) <= (EXACT if case in FLOAT64 else FLOAT32_INSIDE)
    assert two[case]["losses"] == pytest.approx(two[case]["plain"]["losses"], rel=FLOAT32_INSIDE)


@pytest.mark.parametrize("case", streaming_script.BY_CALLBACK)
def test_the_callback_alone_is_enough(two, case):
    found, expected = two[case]["callback"], two[case]["plain"]
    assert worst_step(found, expected) <= (EXACT if case in FLOAT64 else FLOAT32_INSIDE)
    assert found["reductions"] == expected["reductions"] and max(found["chunks"]) > 1


def test_fewer_tokens_are_noticed(two):
    assert worst_step(two["seeking"], two["seeking"]["plain"]) > NOTICED


@pytest.mark.parametrize("case", [name for name in streaming_script.CASES if name not in ("careless", "small buckets")])
def test_processes_synchronise_once_a_step(two, case):
    """As in plain training, whatever the number of chunks, of calls and of micro-batches."""
    assert two[case]["reductions"] == two[case]["plain"]["reductions"] == [[0], [0]]
    assert max(map(sum, two[case]["chunks"])) > 4


def test_every_bucket_is_reduced_once(two):
    """Where gradients are reduced in parts, as those of models are that are not tiny."""
    found, expected = two["small buckets"]["reductions"], two["small buckets"]["plain"]["reductions"]
    assert all(step == list(range(len(step))) and len(step) > 2 for step in found)
    assert len(found[-1]) == len(expected[-1])  # after the first step DistributedDataParallel lays them out by the order of gradients


def test_a_synchronisation_in_every_micro_batch_is_counted(two):
    assert two["careless"]["reductions"] == two["careless"]["plain"]["reductions"] == [[0, 0], [0, 0]]


def test_processes_had_different_numbers_of_chunks(two):
    assert two["whole"]["chunks"] == [[1, 4], [4, 1]]
    assert two["accumulated"]["chunks"] == [[1, 4, 4, 1]] * 2
    first, second = two["skip"]["recomputed"]
    assert first[0] < second[0] and first[1] > second[1]  # as long, but nothing to learn in the later chunks of one of them
