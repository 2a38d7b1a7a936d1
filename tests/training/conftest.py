"""Short runs collect little garbage."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """accelerate collects garbage around every training, among all that was ever imported: most of a short run's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
