"""Which layers end in a norm: what is read off their modules, against what they return."""

import pytest
import torch

from hf_memtune import UnsupportedModelError
from hf_memtune.architectures.stacks import layer_stacks
from tests.support.any_type import batch_of, tiny

POST = {
    "masked": ["bert", "roberta", "electra", "deberta", "deberta-v2", "big_bird", "rembert", "distilbert", "convbert", "layoutlm", "nystromformer"],
    "seq2seq": ["bart", "plbart", "marian", "mvp", "blenderbot-small"],
}  # fmt: skip
PRE = {
    "masked": ["esm", "megatron-bert", "roberta-prelayernorm", "modernbert"],
    "seq2seq": ["mbart", "pegasus", "m2m_100"],
    "causal": ["gpt2", "biogpt"],
}


def ends_in_a_norm(model, kind, stack):
    """Whether what its last layer returns has mean 0 and variance 1 where every norm's own parameters are 0 and 1."""
    with torch.no_grad():
        for module in model.modules():
            if "LayerNorm" in type(module).__name__:  # DeBERTa's is its own
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(name == "weight")
    found = []
    stack.layers[-1].register_forward_hook(lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(**batch_of(model, kind))
    (hidden,) = found
    return bool(hidden.mean(-1).abs().max() < 1e-6 and (hidden.var(-1, correction=0) - 1).abs().max() < 1e-3)


@pytest.mark.parametrize("name, kind, expected", [
    *((name, kind, True) for kind, names in POST.items() for name in names),
    *((name, kind, False) for kind, names in PRE.items() for name in names),
])  # fmt: skip
def test_it_is_what_the_layer_does(name, kind, expected):
    model = tiny(name, kind)
    for stack in layer_stacks(model):
        assert stack.is_post_norm is ends_in_a_norm(model, kind, stack) is expected


def test_a_model_without_such_layers_is_told_so():
    with pytest.raises(UnsupportedModelError, match="found no stack"):
        layer_stacks(tiny("mpnet", "masked"))
