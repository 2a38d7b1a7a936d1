"""What the tests of reversible exactness share with others."""

import torch

from tests.support.reversible_models import (
    inputs_of,
    model_of,
    step,
    twin,
)

# Norms that compute in float32 whatever they are given: what the float inverse is off by may flip a rounding there.
FLOAT32_NORMS = ("llama", "qwen2", "qwen2-sliding", "qwen3", "mistral-sliding", "gemma", "gemma2", "gemma3", "t5", "t5-gated")


def model_and_batch(name, **changed):
    # Gemma 2's eager softmax is in float32, in which float64's smallest number is -inf: its window reaches past the padding
    model = model_of(name, **{"dropout": 0.1, **({"sliding_window": 16} if name == "gemma2" else {}), **changed})
    return model, inputs_of(name, model)


def both_steps(model, batch, handle, **how):
    ours = step(model, batch, **how)
    with twin(handle):
        return ours, step(model, batch, **how)


def assert_equal_steps(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    unequal = [name for name in theirs[1] if not torch.equal(ours[1][name], theirs[1][name])]
    assert not unequal
