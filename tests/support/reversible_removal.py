"""What the tests of reversible removal share with others."""

import torch


def state_of(model):
    """Everything of a model that could be left changed."""
    modules = {
        name: (
            sorted(key for key in vars(m) if key != "_output_capturing_hooks_installed"), m.training,
            len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules),
        )
        for name, m in model.named_modules()
    }  # fmt: skip
    parameters = {name: (p.requires_grad, p.detach().clone(), id(p)) for name, p in model.named_parameters()}
    return modules, parameters


def same_state(found, expected):
    if found[0] != expected[0] or found[1].keys() != expected[1].keys():
        return False
    return all(found[1][name][0::2] == before[0::2] and torch.equal(found[1][name][1], before[1]) for name, before in expected[1].items())
