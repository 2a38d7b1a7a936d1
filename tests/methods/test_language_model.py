"""Whether a model predicts the next token from those before it, of every type that there is; `tests/cli/test_language_models.py` has what commands say."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_memtune.architectures.language_model import looks_ahead, problem_of_language_model
from tests.support.any_type import tiny

ENCODERS = ("bert", "roberta", "electra", "megatron-bert", "rembert", "roformer", "xmod")  # as language models they need is_decoder


@pytest.mark.parametrize("name", [*ENCODERS, "xlm", "xlnet"])
def test_a_model_that_fills_in_masked_tokens_looks_ahead(name):
    assert looks_ahead(tiny(name, "causal", torch.float32, is_decoder=False).eval())


@pytest.mark.parametrize("name", [*ENCODERS, "llama", "mamba2", "qwen3_next", "mixtral", "gemma3_text", "gpt_neo", "rwkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_does_not(name, dtype):
    model = tiny(name, "causal", dtype).eval()
    assert not looks_ahead(model) and problem_of_language_model(model, {"missing_keys": set()}) is None


@pytest.mark.parametrize("name", ["bart", "marian", "pegasus", "trocr", "xlm"])
def test_a_loss_of_shifted_labels_is_told(name):
    """Of decoders of encoder-decoders, and of XLM, which looks back where its config says so: of a row with itself as labels it is that of copying."""
    copying = {}
    for each in (name, "llama"):
        model = tiny(each, "causal", torch.float64, **({"causal": True} if each == "xlm" else {})).eval()
        assert not looks_ahead(model)  # which would be told in any case
        ids = torch.arange(5, 15)[None]
        found = model(input_ids=ids, labels=ids)
        copying[each] = torch.isclose(found.loss.double(), cross_entropy(found.logits[0], ids[0])).item()
        assert ("shifted already" in (problem_of_language_model(model, {"missing_keys": set()}) or "")) == copying[each]
    assert copying == {name: True, "llama": False}


def test_what_cannot_be_run_here_is_not_said_to(monkeypatch):
    model = tiny("bert", "causal", torch.float32, is_decoder=False).eval()
    assert looks_ahead(model)  # sibling
    monkeypatch.setattr(model.bert, "forward", lambda *_, **__: 1 / 0)
    assert not looks_ahead(model)
    monkeypatch.undo()
    assert not looks_ahead(model.to("meta"))


def test_adapters_that_were_loaded_lack_no_weights_of_the_model():
    """Keys that are missing are then those of the adapters."""
    model = tiny("llama", "causal", torch.float32).eval()
    missing = {"missing_keys": {"model.norm.weight", "lm_head.weight", "a"}}
    assert "a, lm_head.weight (3 in all) would be random" in (problem_of_language_model(model, missing) or "")
    model._hf_peft_config_loaded = True
    assert problem_of_language_model(model, missing) is None


def test_4bit_weights_are_left_as_they_are():
    """On some CPUs bitsandbytes repacks them at the first evaluation, and no gradient passes them from then on."""
    seen = []

    class Repacking(nn.Linear):
        support_avx512bf16_for_cpu: bool

        def forward(self, input):
            seen.append(self.support_avx512bf16_for_cpu)
            return super().forward(input)

    Repacking.__module__ = "bitsandbytes.nn"
    model = tiny("llama", "causal", torch.float32).eval()
    model.lm_head.__class__ = Repacking
    model.lm_head.support_avx512bf16_for_cpu = True
    assert not looks_ahead(model) and seen == [False, False] and model.lm_head.support_avx512bf16_for_cpu
