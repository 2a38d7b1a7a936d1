"""Two processes, under DDP and FSDP2 on gloo, find the gradients that one finds on all rows."""

import pytest
import torch

from tests.support import sharing_script
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import worst_difference
from tests.support.two_processes import found_by_two

FLOAT32_NORMS = ("llama",)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return found_by_two(tmp_path_factory, "sharing")[0]


@pytest.mark.parametrize("case", sharing_script.CASES)
def test_two_processes_find_what_one_finds(two_processes, case):
    whole = sharing_script.gradients(case, slice(None), 1)
    allowed = FLOAT32_INSIDE if sharing_script.CASES[case][1] in FLOAT32_NORMS else RELATIVE[torch.float64]
    assert whole.keys() == two_processes[case].keys()
    assert worst_difference(two_processes[case], whole) <= allowed
    assert worst_difference(sharing_script.gradients(case, slice(0, 2), 1), whole) > NOTICED
