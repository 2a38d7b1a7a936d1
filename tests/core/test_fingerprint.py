"""What may change between a call and the run that repeats it is noticed, and where; nothing else is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale

from hf_memtune import MemTuneError
from hf_memtune.core.fingerprint import Alike, Fingerprint
from tests.support.tiny_models import tiny_model


@pytest.fixture
def model():
    adapters = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    adapted = get_peft_model(tiny_model("llama"), adapters)
    adapted.add_adapter("other", adapters)
    return adapted.train()


def attention(model):
    return model.base_model.model.model.layers[1].self_attn


def entered(context):
    """What enters it, for good: a context that is let go of would be left."""

    def enter(model):
        model.entered = context(model)
        model.entered.__enter__()

    return enter


def freeze_and_change(model):
    with torch.no_grad():
        model.base_model.model.model.norm.weight.mul_(2)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda model: attention(model).eval(), r"layers\.1\.self_attn: .*training \(got False, expected True"),
        (lambda model: model.set_adapter("other"), r"layers\.0\.self_attn\.q_proj: .*_active_adapter .*other"),
        (entered(lambda model: model.disable_adapter()), r"q_proj: .*_disable_adapters \(got True"),
        (lambda model: model.merge_adapter(), "q_proj: .*merged_adapters"),
        (entered(lambda model: rescale_adapter_scale(model, 0.5)), "q_proj: .*scaling"),
        (lambda model: model.unload(), "the modules within"),
        (lambda model: model.base_model.model.set_attn_implementation("eager"), "_attn_implementation .got eager"),
        (lambda model: attention(model).register_forward_hook(print), r"layers\.1\.self_attn: .*forward hooks"),
        (lambda model: attention(model).register_forward_pre_hook(print), r"layers\.1\.self_attn: .*forward pre-hooks"),
        (lambda model: model.base_model.model.enable_input_require_grads(), "embed_tokens: .*forward hooks"),
        (freeze_and_change, "frozen weights were changed in place"),
    ],
)
def test_what_decides_is_noticed(model, change, named):
    found = Fingerprint(model)
    found.check()
    change(model)
    with pytest.raises(MemTuneError, match=named):
        found.check("model")


def test_what_does_not_decide_is_not(model):
    found = Fingerprint(model)
    inner = model.base_model.model
    with model.disable_adapter():
        pass
    inner(torch.arange(4)[None], output_hidden_states=True).logits.sum().backward()  # transformers puts on hooks that record
    found.check()
    inner.enable_input_require_grads()
    found = Fingerprint(model)
    inner.gradient_checkpointing_disable()
    inner.gradient_checkpointing_enable()
    inner.enable_input_require_grads()  # one more, and another one
    attention(model).q_proj.lora_A["default"].weight.data.mul_(2)  # trained: of the values of these others take care
    model.register_forward_hook(print)  # of the module itself: no part of its forward
    found.check()


def test_an_adapter_that_was_switched_off_for_a_while_is_as_before():
    """A class of PEFT may say that it is on until it is switched for the first time, as by the reference of DPO."""
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    found = Fingerprint(adapted)
    with adapted.disable_adapter():
        with pytest.raises(MemTuneError, match="_disable_adapters .got True"):
            found.check()
    found.check()


def test_runs_that_are_alike():
    module = torch.nn.Sequential(torch.nn.Dropout(0.1))
    run = Alike(module, "layer", lambda x, factor: x * factor)
    assert run(2, factor=3) == 6 and run(3, 3) == 9
    module.eval()
    with pytest.raises(MemTuneError, match="layer: "):
        run(2, 3)
