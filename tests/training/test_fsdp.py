"""Streamed on two processes that share a model by FSDP2: what one process learns plainly, with one reduction of a unit in a step."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import fsdp_script
from tests.support.fsdp_script import CASES, RUNS
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference
from tests.support.two_processes import launch

EXACT = RELATIVE[torch.float64]
CONFIG = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "accelerate", "fsdp2.yaml")
KEPT = [name for name, case in CASES.items() if not case.reshard]
SHORT_CALLS = ["a short call last", "replicated"]  # some calls are one chunk in both processes, and go the model's own way


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and where. The recipe is the one for GPUs."""
    options = ["--config_file", CONFIG, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    root = tmp_path_factory.mktemp("fsdp")
    status, errors, folder = launch(lambda folder: [*options, fsdp_script.__file__, str(folder)], root / "two")
    assert status == 0, errors
    found = torch.load(Path(folder) / "found.pt", weights_only=True)
    assert found["processes"] == fsdp_script.PROCESSES
    return found | {"folder": Path(folder)}


def allowed(case: fsdp_script.Case) -> float:
    return FLOAT32_INSIDE if case.takes_own_loss else EXACT  # which transformers takes in float32


# -- single steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(two, name):
    case = CASES[name]
    expected = fsdp_script.expected_of(case, seeds=case.dropout > 0)
    for found in two["steps"][name]["gradients"]:  # the second step begins where the first has left FSDP2
        assert found.keys() == expected.keys()
        assert worst_difference(found, expected) <= allowed(case)


def test_other_rows_in_one_process_are_noticed(two):
    other = fsdp_script.expected_of(CASES["one chunk in one process"])
    assert worst_difference(two["steps"]["whole"]["gradients"][0], other) > NOTICED


def test_dropout_acts(two):
    without = fsdp_script.expected_of(CASES["untied"])
    assert worst_difference(two["steps"]["dropout"]["gradients"][0], without) > NOTICED


def reductions(case: fsdp_script.Case, trained: int) -> int:
    return trained * (1 if case.defers else len(case.calls))


@pytest.mark.parametrize("name", [name for name in CASES if name not in SHORT_CALLS])
def test_each_unit_is_reduced_once_a_step(two, name):
    found = two["steps"][name]
    assert found["seen"]["reductions"] == reductions(CASES[name], found["trained"])


@pytest.mark.parametrize("name", ["whole", "whole kept", "lora", "accumulated"])
def test_as_often_as_in_plain_training(two, name):
    assert two["plain"][name]["seen"]["reductions"] == two["steps"][name]["seen"]["reductions"]


def test_more_reductions_are_counted(two):
    """Sibling: a call that goes the model's own way is reduced by itself, where it goes backward before the others."""
    found = two["steps"]["a short call last"]
    assert found["seen"]["reductions"] > found["trained"]


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_gathered_is_gathered_once_a_micro_batch(two, name):
    found, case = two["steps"][name], CASES[name]
    assert found["seen"]["gathers"] == found["groups"] * len(case.calls)


@pytest.mark.parametrize("name", ["whole", "untied", "lora", "layers", "two calls", "checkpointed"])
def test_of_what_is_freed_one_unit_is_gathered_at_a_time(two, name):
    """Beside the root and the group of the head, which stay; where all stay, all are there."""
    assert two["steps"][name]["seen"]["gathered"] <= 3 < two["steps"]["whole kept"]["seen"]["gathered"]


def test_a_failed_step_leaves_nothing_behind(two):
    expected = fsdp_script.expected_of(CASES["whole"])
    assert worst_difference(two["after a failure"][True], expected) <= EXACT
    assert worst_difference(two["after a failure"][False], expected) > NOTICED  # sibling: sums that are not dropped


def test_half_precision_is_as_exact_as_plain_training_in_it(two):
    """Chunks are summed in the dtype that gradients are reduced in."""
    streamed, plain = two["half precision"]["streamed"], two["half precision"]["plain"]
    assert NOTICED < streamed["apart"] <= 1.2 * plain["apart"]
    assert streamed["summed in"] == ["torch.float32"] and plain["summed in"] == ["torch.bfloat16"]


def test_logits_after_backward_are_refused(two):
    assert "LogitsError" in two["late logits"] and "FSDP2 has let go" in two["late logits"]


# -- trainers ------------------------------------------------------------------------------------------------------------


def worst_step(found, expected) -> float:
    assert len(found["gradients"]) == len(expected["gradients"]) == 2
    return max(worst_difference(*pair) for pair in zip(found["gradients"], expected["gradients"]))


@pytest.mark.parametrize("name, kind", [*((name, "trainer") for name in RUNS), ("whole", "callback")])
def test_a_trainer_learns_what_a_plain_one_learns(two, name, kind):
    found, expected = two["runs"][name][kind], two["runs"][name]["plain"]
    assert worst_step(found, expected) <= FLOAT32_INSIDE
    assert found["losses"] == pytest.approx(expected["losses"], rel=FLOAT32_INSIDE)
    assert found["reductions"] == expected["reductions"] and len(set(found["reductions"])) == 1
    assert found["units"] == expected["units"] > 3


def test_trainers_streamed(two):
    """Or there was nothing to compare: chunks gather units again, where these do not stay."""
    runs = two["runs"]
    assert runs["whole"]["trainer"]["gathers"] == runs["whole"]["callback"]["gathers"] > 2 * runs["whole"]["plain"]["gathers"]
    assert runs["kept"]["trainer"]["gathers"] == runs["kept"]["plain"]["gathers"]
    assert runs["checkpointed"]["trainer"]["units"] > runs["whole"]["trainer"]["units"]  # wrappers around layers pass for units


@pytest.mark.parametrize("name, kind", [*((name, "trainer") for name in RUNS), ("whole", "callback")])
def test_no_logits_are_made(two, name, kind):
    found = two["runs"][name]
    assert found[kind]["fused"] == 2 * RUNS[name][1] and found["plain"]["fused"] == 0


def test_two_steps_are_not_alike(two):
    first, second = two["runs"]["whole"]["plain"]["gradients"]
    assert worst_difference(first, second) > NOTICED


def test_a_run_goes_on_where_it_was_saved(two):
    runs = two["runs"]
    assert worst_difference(runs["resumed"]["parameters"], runs["saved"]["parameters"]) <= EXACT
    assert worst_difference(runs["saved"]["parameters"], runs["saved plainly"]["parameters"]) <= FLOAT32_INSIDE
    assert worst_difference(runs["not resumed"]["parameters"], runs["saved"]["parameters"]) > NOTICED
    assert len(runs["resumed"]["gradients"]) == 1


def test_what_is_saved_is_the_plain_model(two):
    ours, theirs = (load_file(two["folder"] / kind / "final" / "model.safetensors") for kind in ("saved", "saved plainly"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in two["runs"]["saved"]["parameters"].items())
