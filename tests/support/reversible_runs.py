"""What runs with reversible layers share: a model of four layers, adapters that count, and arguments."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_memtune import (
    MemEfficientTrainer,
)
from tests.support.reversible_models import twin
from tests.support.runs import arguments, text_rows
from tests.support.tiny_models import tiny_model

ROWS = text_rows(24)
ADAPTERS = {"adapter_rank": 4, "adapter_init_std": 0.2}  # far from zero, so that they count
CENTRED = {"seeking": True, "token_seeking": False, "reversible": "centred", **ADAPTERS}


@pytest.fixture(autouse=True)
def quiet():
    """`arguments` sets some of token seeking, which is off in most runs here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no effect without token_seeking")
        yield


def deep(dtype=torch.float32, num_hidden_layers=4, **overrides):
    return tiny_model("llama", dtype=dtype, num_hidden_layers=num_hidden_layers, **overrides)


def adapted(**overrides):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(deep(**overrides), config)


def reversible(tmp_path, **settings):
    return arguments(tmp_path, **CENTRED | settings)


class TwinTrainer(MemEfficientTrainer):
    """The same coupled network under plain autograd."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.preflight.looks = False  # that nothing runs again in backward is an error otherwise

    def training_step(self, *args, **kwargs):
        with twin(self.reversible):
            return super().training_step(*args, **kwargs)


class Unseen(MemEfficientTrainer):
    """Looks at nothing before the first step."""

    def _verify_layers(self, batches):
        pass
