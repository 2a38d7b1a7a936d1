"""What the tests of removal share with others."""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

HOOKS = [key for key in vars(torch.nn.Module()) if key.endswith("_hooks")]


def registered():
    """The names that the two interfaces know. Compare with `<=`: what an earlier test left in a cycle may go at any time."""
    return {(interface.__name__, name) for interface in (AttentionInterface, AttentionMaskInterface) for name in interface._global_mapping}


def traces(model):
    """Everything that a method could leave on a model."""
    modules = dict(model.named_modules())
    return {
        "parameters": list(model.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "forwards": {name: vars(module).get("forward") for name, module in modules.items()},
        "own parameters": {name: [id(p) for p in module._parameters.values()] for name, module in modules.items()},
        "hooks": {name: {h: len(vars(module)[h] or ()) for h in HOOKS} for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attention": {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        "config attributes": sorted(vars(model.config)),
        "checkpointing": {
            name: getattr(vars(module).get("_gradient_checkpointing_func"), "func", None) for name, module in modules.items()
        },
    }
