"""What the tests of checkpointing share with others."""

import torch
from peft import LoraConfig, get_peft_model

from tests.support.runs import llama


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(llama(dtype), config)


def worst_difference_of_all(found, expected) -> float:
    """Relative error of the gradient as one vector."""
    vectors = [torch.cat([gradients[name].flatten() for name in sorted(expected)]) for gradients in (found, expected)]
    return float((vectors[0] - vectors[1]).norm() / vectors[1].norm())
