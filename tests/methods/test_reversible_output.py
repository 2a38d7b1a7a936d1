"""What a stack of reversible layers hands on: the newest stream, or a blend of both (reversible_output)."""

import pytest
import torch

from tests.support.reversible_models import inputs_of, model_of, reversible_of
from tests.support.tolerances import NOTICED, close

FACTORS = {"reversible_scale": 0.25, "reversible_beta": 0.5}
OF_CENTRED = {"reversible_scale": 0.25}


@pytest.mark.parametrize(
    "name, coupling, settings, weights",
    [
        ("bert", "centred", OF_CENTRED, (1.0, 0.0)),
        ("llama", "centred", OF_CENTRED, (1.0, 0.0)),
        ("bert", "meft1", FACTORS, (0.5, 0.5)),  # post-norm: the mean of the streams
        ("llama", "meft1", FACTORS, (1.0, 0.25)),  # pre-norm: their sum, the older one by the small factor
        ("llama", "meft2", FACTORS, (1.0, 0.5)),  # whose small factor is beta
        ("llama", "meft3", FACTORS, (1.0, 0.25)),
        ("llama", "meft1", FACTORS | {"reversible_output": "mean"}, (0.5, 0.5)),
        ("bert", "meft1", FACTORS | {"reversible_output": "sum"}, (1.0, 0.25)),
        ("bert", "meft3", FACTORS | {"reversible_output": "newest"}, (1.0, 0.0)),
    ],
)
def test_the_papers_blend_follows_from_the_norms(name, coupling, settings, weights):
    handle = reversible_of(model_of(name), coupling, "float", **settings)
    assert {shared.weights for shared in handle.shared} == {weights}


@pytest.mark.parametrize("coupling, factor", [("meft1", 0.25), ("meft2", 0.5)])
def test_blends_are_of_the_same_two_streams(coupling, factor):
    """The older stream, once from the mean and once from the sum."""
    found = {}
    for output in ("newest", "mean", "sum"):
        model = model_of("bert")
        torch.manual_seed(0)
        reversible_of(model, coupling, "float", **FACTORS, reversible_output=output)
        inputs = {key: value for key, value in inputs_of("bert", model).items() if key != "labels"}
        found[output] = model.bert(**inputs).last_hidden_state.detach()
    older = 2 * found["mean"] - found["newest"]
    torch.testing.assert_close((found["sum"] - found["newest"]) / factor, older, **close(torch.float64))
    assert (older - found["newest"]).abs().max() > NOTICED
