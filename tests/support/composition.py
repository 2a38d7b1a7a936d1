"""What the tests of composition share with others."""

import copy

import peft
import pytest
import torch

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["re-entrant", "non-re-entrant"])


def with_lora(model, targets="all-linear", seed=5, **settings):
    """Random adapters: with the usual zero one, half of the gradients would be zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


def whole_error(found, expected):
    """Relative error of the gradient as one vector: in half precision single parameters may be all rounding."""
    assert found.keys() == expected.keys()
    distance = sum((found[name].double() - g.double()).square().sum() for name, g in expected.items())
    return float((distance / sum(g.double().square().sum() for g in expected.values())).sqrt())


def checkpointed(model, reentrant):
    """A copy with activation checkpointing on."""
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model
