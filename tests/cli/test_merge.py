"""`hf-memtune merge`: a LoRA folder becomes a plain model that computes the same."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_memtune.cli import main
from tests.support.folders import tokenizer

IDS = torch.tensor([[2, 10, 11, 12, 13]])


def adapters(model, folder, dtype=torch.float32, task="CAUSAL_LM", **options):
    """A folder of LoRA adapters that change the model, as peft writes it."""
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    base = auto.from_pretrained(model, dtype=dtype, **options)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type=task))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def test_the_merged_model_computes_the_same_and_needs_no_adapters(model, tmp_path, capsys):
    wrapped = adapters(model, "run")
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    assert "float32, saved in plain" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained("plain")
    assert not isinstance(plain, PeftModel) and not (tmp_path / "plain" / "adapter_config.json").exists()
    torch.testing.assert_close(plain(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert (plain(IDS).logits - base(IDS).logits).abs().max() > 1e-3  # the adapters do something
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "plain").iterdir()}
    assert AutoTokenizer.from_pretrained("plain").chat_template == tokenizer(chat=True).chat_template


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype(dtype, model, tmp_path):
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained("base")
    adapters("base", "run", dtype)
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "plain" / "model.safetensors").values()} == {dtype}


@torch.no_grad()
def test_a_classifier_keeps_its_trained_head(model):
    wrapped = adapters(model, "run", task="SEQ_CLS", num_labels=3)
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained("plain")
    assert plain.config.num_labels == 3
    torch.testing.assert_close(plain(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-5)


EVERY = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both, as one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens of both": {"target_modules": ["q_proj"], "trainable_token_indices": [11, 12]},
    "neither": {"target_modules": ["q_proj"]},
}


def tied_adapters(model, folder, dtype=torch.float32, **kinds):
    """A folder of adapters, all of them changed, of a model whose embedding and head are one."""
    config = AutoModelForCausalLM.from_pretrained(model).config
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained("tied")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained("tied"), LoraConfig(r=2, task_type="CAUSAL_LM", **kinds))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", EVERY)
def test_embedding_and_head_that_are_one_are_merged_each_for_itself(kind, model, monkeypatch):
    wrapped = tied_adapters(model, "run", **EVERY[kind])
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    plain = AutoModelForCausalLM.from_pretrained("plain")
    torch.testing.assert_close(plain(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-5)
    is_one = kind == "neither"
    assert plain.config.tie_word_embeddings == is_one == (plain.lm_head.weight is plain.model.embed_tokens.weight)
    if kind == "head":  # merged into what both share
        monkeypatch.setattr("hf_memtune.cli.merge._untie", lambda wrapped: None)
        assert main(["merge", "--model", "run", "--output_dir", "shared"]) == 0
        assert (AutoModelForCausalLM.from_pretrained("shared")(IDS).logits - wrapped(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["head", "saved both"])
def test_what_is_untied_keeps_its_dtype(kind, model, tmp_path):
    tied_adapters(model, "run", torch.bfloat16, **EVERY[kind])
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16} and "lm_head.weight" in stored


def test_a_base_model_that_has_moved_is_named_and_can_be_given(model, tmp_path, capsys):
    adapters(model, "run")
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "./gone"}))
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 2
    shown = capsys.readouterr().err
    assert "'./gone'" in shown and "--base_model" in shown
    assert main(["merge", "--model", "run", "--output_dir", "plain", "--base_model", str(model)]) == 0


def test_adapters_of_another_model_are_refused(model, encoder, capsys):
    adapters(model, "run")
    other = AutoModelForCausalLM.from_pretrained(model)
    config = other.config
    config.intermediate_size = 128
    AutoModelForCausalLM.from_config(config).save_pretrained("other")
    assert main(["merge", "--model", "run", "--output_dir", "plain", "--base_model", "other"]) == 2
    assert "do not fit the model 'other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, expected",
    [
        (["reversible_config.json"], "They cannot be merged"),
        (["config.json"], "holds no LoRA adapters"),
        ([], "holds no LoRA adapters"),
    ],
)
def test_a_folder_of_something_else(files, expected, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in files:
        (tmp_path / "run" / name).write_text("{}")
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "plain").exists()


def test_every_problem_at_once(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["merge", "--model", "absent", "--output_dir", "full"]) == 2
    shown = capsys.readouterr().err
    assert "'absent' is not a folder" in shown and "'full' exists and is not an empty folder" in shown


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_what_fails_half_way_leaves_no_model(exists, model, tmp_path, monkeypatch):
    adapters(model, "run")
    if exists:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / ".plain.x1y2z3_a.partial").mkdir()  # of one that was killed: no reason to refuse the folder
    with monkeypatch.context() as patch:
        unsaved = SimpleNamespace(pad_token_id=None, save_pretrained=lambda folder: 1 / 0)
        patch.setattr("hf_memtune.cli.merge._tokenizer", lambda *sources: unsaved)
        pytest.raises(ZeroDivisionError, main, ["merge", "--model", "run", "--output_dir", "plain"])
    assert not list(tmp_path.glob("**/model.safetensors"))
    assert main(["merge", "--model", "run", "--output_dir", "plain"]) == 0
    AutoModelForCausalLM.from_pretrained("plain")
