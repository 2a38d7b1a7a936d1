"""Every test runs offline, on one thread, from the same seed, with little garbage to look for."""

import gc
import os

# Before any import below: these libraries read the environment once, when they are imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """Tests collect garbage, and accelerate does around every training: among what a file has made, not among all that was ever imported.

    What is frozen stays so. It is what lives from one file to the next, which dies with the process.
    """
    gc.collect()
    gc.freeze()
