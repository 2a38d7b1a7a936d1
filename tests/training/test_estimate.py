"""The contract of estimates: against a real step of MemEfficientTrainer on a CPU never under, and at most 5 % over."""

import random

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from hf_memtune import ConfigError, MemEfficientTrainingArguments, StepAccountCallback, UnsupportedModelError, estimate
from hf_memtune.forecast import estimate as predicting
from hf_memtune.forecast.blank_model import batch_shapes, blank_model
from hf_memtune.memory.estimate import MemoryEstimate
from tests.support.any_type import tiny
from tests.support.runs import arguments, pad_right, trainer_for
from tests.support.tiny_models import CONFIGS, VOCABULARY, tiny_model

TOKENS, ROWS = 48, 2
STREAMED = {"sequence_chunk_size": 16, "activation_checkpointing": True}
KEPT = {"keep_attention_outputs": True}
SEEKING = {"token_seeking": True, "token_ratio": 0.3}
CASES = {
    "accumulated": ("llama", {"gradient_accumulation_steps": 3, "bf16": True}),
    "streamed, LoRA": ("llama", STREAMED | {"lora": True}),
    "streamed, attention kept": ("llama", STREAMED | KEPT),
    "seeking": ("qwen3", SEEKING),
    "padded, sliding": ("gemma3", {"padded": True}),
    "8 bits": ("llama", {"optim": "adamw_8bit", "vocab_size": 2000}),
    "two levels": ("llama", {"checkpoint_levels": 2, "optim": "adafactor"}),
}


def setting(folder, name, lora=False, padded=False, vocab_size=VOCABULARY, num_hidden_layers=3, head=None, **settings):
    """A model, arguments, and rows for two optimizer steps."""
    size = {"max_position_embeddings": 64, "vocab_size": vocab_size, "num_hidden_layers": num_hidden_layers}
    model = tiny_model(name, head, torch.float32, **size)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    fixed = {"optim": "adamw_torch", "per_device_train_batch_size": ROWS, "logging_strategy": "no", "max_grad_norm": 1.0}
    args = arguments(folder, **{"token_seeking": False, "token_ratio": None, "context_normalize": None} | fixed | settings)
    count = 2 * ROWS * args.gradient_accumulation_steps
    lengths = [TOKENS - int(padded and number % 2) for number in range(count)]
    rows = [{"input_ids": [5 + (n * 7) % 50 for n in range(length)]} for length in lengths]
    for number, row in enumerate(rows):
        row["labels"] = number % 2 if head == "sequence_classification" else row["input_ids"]
    return model, args, rows


def measured(model, args, rows):
    trainer = trainer_for(model, args, rows, data_collator=pad_right)
    trainer.add_callback(taken := StepAccountCallback(trainer))
    trainer.train()
    return taken.account


@pytest.mark.parametrize("case", CASES)
def test_never_under_and_within_five_percent(case, tmp_path):
    name, settings = CASES[case]
    model, args, rows = setting(tmp_path, name, **settings)
    predicted = estimate(model, args, sequence_length=TOKENS, padded=settings.get("padded", False))
    found = measured(model, args, rows)
    assert found.peak_bytes <= predicted.peak_bytes <= 1.05 * found.peak_bytes
    for phase in found.phases:
        assert phase.peak_bytes <= predicted.account.phase(phase.phase).peak_bytes


def test_rows_that_are_evaluated_are_padded_among_themselves(tmp_path):
    """One row is trained on at a time, and several are evaluated, which differ in length; and the other way round."""
    for trained, evaluated in ((1, 4), (4, 1)):
        sizes = {"per_device_train_batch_size": trained, "per_device_eval_batch_size": evaluated}
        model, args, rows = setting(
            tmp_path, "llama", eval_strategy="steps", eval_steps=9, memory_preflight=True, memory_report=False, **sizes
        )
        lengths = [TOKENS - number % 2 for number in range(8)]
        rows = [{"input_ids": row["input_ids"][:length], "labels": row["input_ids"][:length]} for row, length in zip(rows * 4, lengths)]
        predicted = estimate(model, args, sequence_length=TOKENS).account
        trainer = trainer_for(model, args, rows, data_collator=pad_right, eval_dataset=rows)
        trainer.train()
        found, within = trainer.preflight.report, {}
        assert found.predicted.account.phase("evaluation") == predicted.phase("evaluation")
        for phase in ("forward", "evaluation"):
            within[phase] = predicted.phase(phase).peak_bytes / found.account.phase(phase).peak_bytes
        assert all(1 <= share <= 1.05 for share in within.values()), within


def test_logits_that_a_metric_reads_are_predicted(tmp_path):
    """More of them than are made at a time where the loss alone is wanted. Sibling: where it is told not to."""
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": 9,
        "per_device_eval_batch_size": 8,
        "memory_preflight": True,
        "memory_report": False,
    }
    for loss_only in (False, True):
        model, args, rows = setting(tmp_path, "llama", vocab_size=30_000, num_hidden_layers=1, prediction_loss_only=loss_only, **evaluated)
        trainer = trainer_for(model, args, rows, data_collator=pad_right, eval_dataset=rows * 4, compute_metrics=lambda found: {})
        trainer.train()
        found = trainer.preflight.report
        predicted, measured = (a.phase("evaluation").peak_bytes for a in (found.predicted.account, found.account))
        assert measured <= predicted <= 1.05 * measured
        assert ("keeps the logits" in str(found.notes)) == trainer.wants_logits == (not loss_only)


class OfTwo(MemEfficientTrainingArguments):
    @property
    def world_size(self):
        return 2


def test_of_several_processes_the_buckets_are_counted(tmp_path):
    """The gradients of what is trained once more, in every phase."""
    model, args, _ = setting(tmp_path, "llama", lora=True, **STREAMED)
    alone = estimate(model, args, sequence_length=TOKENS, evaluation=True).account
    args.__class__ = OfTwo
    of_two = estimate(model, args, sequence_length=TOKENS, evaluation=True).account
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained and {phase.phase for phase in alone.phases} >= {"backward", "evaluation"}
    for phase in alone.phases:
        assert of_two.phase(phase.phase).peak_bytes == phase.peak_bytes + trained


@pytest.mark.parametrize("settings", [{}, {"sequence_chunk_size": 16}], ids=["plain", "streamed"])
def test_what_depends_on_values_is_said_and_leaves_no_account_open(settings, tmp_path):
    _, args, _ = setting(tmp_path, "llama", **settings)
    with pytest.raises(UnsupportedModelError, match="depends on the values of its tensors"):
        estimate(tiny("granitemoehybrid", dtype=torch.float32), args, sequence_length=TOKENS)  # experts, one by one
    assert not _len_torch_dispatch_stack()


@pytest.mark.parametrize("settings", [{}, {"sequence_chunk_size": 16}, STREAMED], ids=["plain", "streamed", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_states_that_layers_hand_on(name, settings, tmp_path):
    _, args, rows = setting(tmp_path, "llama", **settings)
    model = tiny(name, dtype=torch.float32)
    predicted = estimate(model, args, sequence_length=TOKENS, padded=False)
    found = measured(model, args, rows)
    assert found.peak_bytes <= predicted.peak_bytes <= 1.05 * found.peak_bytes


def test_a_few_layers_of_each_kind_tell_what_all_would(tmp_path):
    _, args, _ = setting(tmp_path, "llama", sequence_chunk_size=TOKENS // 2)
    kinds = ["linear_attention", "full_attention"] * 4
    model = tiny("qwen3_5_text", dtype=torch.float32, num_hidden_layers=8, layer_types=kinds)
    short, whole = (estimate(model, args, sequence_length=TOKENS, every_layer=every) for every in (False, True))
    assert short.extrapolated == "8 layers, from traces of 4 and 6"
    assert short.account.phases == whole.account.phases


def test_an_estimate_of_another_run_is_seen_to_be_wrong(tmp_path):
    model, args, rows = setting(tmp_path, "llama")
    found = measured(model, args, rows).peak_bytes
    for wrong in ({"sequence_length": TOKENS // 2}, {"batch_size": 1}):
        assert estimate(model, args, **{"sequence_length": TOKENS, "padded": False} | wrong).peak_bytes < 0.95 * found


def test_encoders_that_classify_rows(tmp_path):
    model, args, rows = setting(tmp_path, "bert", head="sequence_classification", **SEEKING)
    predicted = estimate(model, args, sequence_length=TOKENS, padded=False)
    found = measured(model, args, rows)
    assert found.peak_bytes <= predicted.peak_bytes <= 1.05 * found.peak_bytes


@pytest.mark.parametrize(
    "head",
    [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}, {"num_labels": 2, "problem_type": "regression"}],
)
def test_rows_that_have_values_for_labels(head, tmp_path):
    _, args, _ = setting(tmp_path, "bert", head="sequence_classification")
    model = tiny_model("bert", "sequence_classification", torch.float32, **head)
    (shape, kind) = batch_shapes(model, 2, 8)["labels"]
    assert kind == torch.float32 and shape == ((2,) if head["num_labels"] == 1 else (2, head["num_labels"]))
    assert estimate(model, args, sequence_length=TOKENS).peak_bytes > sum(p.nbytes for p in model.parameters())


def test_a_search_for_overflow_is_left_out_since_it_looks_at_values(tmp_path):
    model, args, _ = setting(tmp_path, "llama")
    searching = setting(tmp_path, "llama", debug="underflow_overflow")[1]
    assert estimate(model, searching, sequence_length=TOKENS).account == estimate(model, args, sequence_length=TOKENS).account


def test_a_count_of_tokens_is_left_out_since_it_looks_at_values(tmp_path):
    counted, plain = (setting(tmp_path, "llama", include_num_input_tokens_seen=count)[:2] for count in ("non_padding", "no"))
    assert estimate(*counted, sequence_length=TOKENS).account == estimate(*plain, sequence_length=TOKENS).account


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit", "galore_adamw_8bit", "apollo_adamw"])
def test_optimizers_whose_state_is_not_known_are_refused(optim, tmp_path):
    """They would be taken for bitsandbytes', or be made, of packages that may not be there."""
    model, args, _ = setting(tmp_path, "llama", optim=optim)
    with pytest.raises(ConfigError, match=f"optim: got '{optim}', whose state is not predicted"):
        estimate(model, args, sequence_length=TOKENS)


BY_LAYERS = {"sequence_chunk_size": TOKENS // 4, "stream_order": "layers"}


BY_CHUNKS = BY_LAYERS | {"stream_order": "chunks"}


@pytest.mark.parametrize("settings", [SEEKING, BY_CHUNKS, BY_CHUNKS | KEPT], ids=["seeking", "by chunks", "attention kept"])
def test_a_few_layers_tell_what_all_would(tmp_path, settings):
    model, args, _ = setting(tmp_path, "llama", num_hidden_layers=6, **settings)
    short, whole = (estimate(model, args, sequence_length=TOKENS, evaluation=True, every_layer=every) for every in (False, True))
    assert short.account.phases == whole.account.phases and short.flops == whole.flops
    assert short.extrapolated == "6 layers, from traces of 2 and 3" and whole.extrapolated is None
    assert [phase.phase for phase in short.account.phases][-1] == "evaluation"


@pytest.mark.parametrize("kept", [{}, KEPT], ids=["", "attention kept"])
def test_by_layers_a_third_trace_tells_moments_that_look_alike_apart(tmp_path, kept, monkeypatch):
    """Where all is trained: near the end of backward most gradients are there, and at its beginning the inputs of most layers."""
    model, args, _ = setting(tmp_path, "llama", num_hidden_layers=13, **BY_LAYERS, **kept)
    short, whole = (estimate(model, args, sequence_length=TOKENS, every_layer=every) for every in (False, True))
    assert short.account.phases == whole.account.phases and short.flops == whole.flops
    assert short.extrapolated == "13 layers, from traces of 3, 4 and 5"
    monkeypatch.setattr(predicting, "_is_ambiguous", lambda model, args: False)
    assert estimate(model, args, sequence_length=TOKENS).peak_bytes > whole.peak_bytes  # the sibling


def test_a_config_is_as_good_as_its_model(tmp_path):
    model, args, _ = setting(tmp_path, "llama")
    config = model.config
    config.dtype = torch.float32
    of_config, of_model = (estimate(given, args, sequence_length=TOKENS) for given in (config, model))
    assert of_config.account.phases == of_model.account.phases
    assert MemoryEstimate.from_dict(of_config.to_dict()) == of_config


def test_nothing_is_changed(tmp_path):
    model, args, _ = setting(tmp_path, "llama", activation_checkpointing=True)
    states = [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)]
    before, drawn, python = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state(), random.getstate()
    attention = model.config._attn_implementation
    estimate(model, args, sequence_length=TOKENS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn) and random.getstate() == python
    assert states == [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)]
    assert model.config._attn_implementation == attention and not model.is_activation_checkpointing
    assert list(tmp_path.iterdir()) == []


def test_what_depends_on_values_is_refused(tmp_path):
    model, args, _ = setting(tmp_path, "llama", token_seeking=True, token_gradient="skip")
    with pytest.raises(ConfigError) as raised:
        estimate(model, args, batch_size=0)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["batch_size", "token_gradient"]


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    model, args, _ = setting(tmp_path, "mixtral")
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM: what it computes depends on the values"):
        estimate(model, args, sequence_length=TOKENS)


def test_blank_models_have_the_head_their_config_names():
    config = CONFIGS["bert"]()
    config.architectures = ["BertForSequenceClassification"]
    model = blank_model(config)
    assert type(model).__name__ == "BertForSequenceClassification" and model.device.type == "meta"
    assert batch_shapes(model, 2, 8)["labels"] == ((2,), torch.long) and "token_type_ids" in batch_shapes(model, 2, 8)
    config.architectures = None
    assert "labels" in batch_shapes(blank_model(CONFIGS["llama"]()), 2, 8)


def test_a_model_that_a_trainer_has_prepared(tmp_path):
    """accelerate wraps its forward; what is estimated is the model underneath, on shapes."""
    model, args, rows = setting(tmp_path, "llama", bf16=True)
    before = estimate(model, args, sequence_length=TOKENS)
    trainer = trainer_for(model, args, rows, data_collator=pad_right)
    trainer.train()
    assert "_original_forward" in vars(model)
    assert estimate(model, args, sequence_length=TOKENS).account.phases == before.account.phases
    assert "_original_forward" in vars(model)


def test_a_model_whose_layers_are_changed_is_refused(tmp_path):
    model, args, rows = setting(tmp_path, "llama", reversible="centred")
    trainer_for(model, args, rows)
    with pytest.raises(UnsupportedModelError, match="Estimate before the trainer is made"):
        estimate(model, args, sequence_length=TOKENS)
