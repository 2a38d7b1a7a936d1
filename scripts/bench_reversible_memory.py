"""Activation bytes of full fine-tuning, LoRA, checkpointing and reversible layers: `python scripts/bench_reversible_memory.py`.

A whole step of the true shapes of RoBERTa-large and OPT-1.3B is traced, without weights; and one stack at several depths, for the picture.
Writes results/reversible_memory.jsonl, one line a measurement; what the file already has is not measured again.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers as tf
from causal_lm_step import materialise
from conditions import conditions
from options import parse, several, some_of
from store import measure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_memtune import LiveBytes, ReversibleConfig, checkpoint_in_two_levels, make_reversible
from hf_memtune.core.loss import linear_loss
from hf_memtune.memory import fake


def roberta_large(layers: int, **changed) -> tf.PreTrainedConfig:
    return tf.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, num_labels=2, **changed,
    )  # fmt: skip


def opt_1b(layers: int, **changed) -> tf.PreTrainedConfig:
    return tf.OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, ffn_dim=8192, max_position_embeddings=2048,
        word_embed_proj_dim=2048, **changed,
    )  # fmt: skip


# attention: "sdpa" keeps no matrix of tokens by tokens, and has no dropout inside it, as flash attention on a GPU keeps none either;
# "eager", of the time of the paper, has both. OPT's rank is the paper's.
SHAPES: dict[str, dict] = {
    "RoBERTa-large": {"config": roberta_large, "attention": "sdpa", "rows": 32, "tokens": 512, "rank": 8},
    "RoBERTa-large, eager attention": {"config": roberta_large, "attention": "eager", "rows": 32, "tokens": 512, "rank": 8},
    "OPT-1.3B": {"config": opt_1b, "attention": "sdpa", "rows": 32, "tokens": 512, "rank": 64},
}
PLAIN = {
    "full fine-tuning": {},
    "full fine-tuning, checkpointing": {"saver": "one level"},
    "full fine-tuning, two-level checkpointing": {"saver": "two levels"},
    "LoRA": {"lora": 8},
    "LoRA, checkpointing": {"lora": 8, "saver": "one level"},
    "LoRA, two-level checkpointing": {"lora": 8, "saver": "two levels"},
}
COUPLED = {
    f"{coupling} {numerics}": {"coupling": coupling, "numerics": numerics}
    for coupling in ("centred", "meft1", "meft2", "meft3")
    for numerics in ("float", "exact")
}
METHODS = PLAIN | COUPLED | {"centred exact, 1/8": {"coupling": "centred", "numerics": "exact", "scale": 1 / 8}}
LAYERS, DEPTHS = 24, (6, 12, 24, 48, 96)
OVER_DEPTH = (*list(PLAIN)[:3], "centred float", "centred exact", "centred exact, 1/8")
DEPTH_SHAPE = "RoBERTa-large"
KEY = ("model", "layers", "method")


def main(given: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", message="reversible_numerics=float")
    depths = several(DEPTHS, f"depths of {DEPTH_SHAPE}, beside its own")
    options = parse(__doc__, "reversible_memory", given, models=some_of(SHAPES), layers=depths, methods=some_of(METHODS))
    runs = [(name, LAYERS, method) for name in options.models for method in METHODS]
    runs += [(DEPTH_SHAPE, depth, method) for depth in options.layers for method in OVER_DEPTH if DEPTH_SHAPE in options.models]
    wanted = [dict(zip(KEY, run)) for run in dict.fromkeys(runs) if run[2] in options.methods]
    measure(options.out, wanted, measured, "Tracing")


def measured(run: dict) -> dict:
    began, shape = time.perf_counter(), SHAPES[run["model"]]
    found = traced_step(shape, METHODS[run["method"]], run["layers"])
    described = {name: shape[name] for name in ("attention", "rows", "tokens")} | {"adapter_rank": shape["rank"]}
    return {**found, "seconds": round(time.perf_counter() - began, 1), "conditions": conditions(dtype="bfloat16", **described)}


def traced_step(shape: dict, method: dict, layers: int, **changed) -> dict:
    """Bytes above weights and gradients: alive after the forward of the body, and at the peak of the whole step."""
    sdpa = shape["attention"] == "sdpa"
    silent = {"attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0} if sdpa else {}
    with torch.device("meta"):
        model = _model(shape["config"](layers, **silent, **changed), shape["attention"], method)
    with FakeTensorMode(), fake.sdpa_without_padding() if sdpa else nullcontext() as attention:
        materialise(model, torch.bfloat16, torch.device("cpu"))
        if attention is not None:
            fake.use_sdpa(model, attention)
        _install(model, method, shape["rank"])
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:  # of a step before: they are no part of what a step needs
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes() as live:
            after_body = _step(model, shape, lambda: live.current_bytes)
        return {
            "kept_bytes": after_body,
            "peak_bytes": live.peak_bytes,
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
            "trained_parameters": sum(p.numel() for p in trained),
        }


def _model(config: tf.PreTrainedConfig, attention: str, method: dict) -> nn.Module:
    classifies = config.model_type == "roberta"
    auto = tf.AutoModelForSequenceClassification if classifies else tf.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if rank := method.get("lora"):
        from peft import LoraConfig, get_peft_model

        task = "SEQ_CLS" if classifies else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type=task), autocast_adapter_dtype=False)
    return model.train()


def _install(model: nn.Module, method: dict, rank: int) -> None:
    if method.get("saver") == "one level":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif method.get("saver") == "two levels":
        checkpoint_in_two_levels(model)
    elif "coupling" in method:
        scale = {"reversible_scale": method["scale"]} if "scale" in method else {}
        config = ReversibleConfig(reversible=method["coupling"], reversible_numerics=method["numerics"], adapter_rank=rank, **scale)
        make_reversible(model, config)


def _step(model: nn.Module, shape: dict, current: Callable[[], int]) -> int:
    """Forward and backward; of a language model the head is fused with the loss, whatever the method. Returns what the body has left."""
    head_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.zeros(shape["rows"], shape["tokens"], dtype=torch.long)
    if head_model.get_output_embeddings() is None:
        found: list[int] = []
        head_model.base_model.register_forward_hook(lambda *args: found.append(current()))
        model(input_ids=ids, labels=ids[:, 0]).loss.backward()
        return found[0]
    hidden = head_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    kept = current()
    head = head_model.get_output_embeddings()
    (linear_loss(hidden.flatten(0, 1), head.weight, head.bias, ids.flatten()) / ids.numel()).backward()
    return kept


if __name__ == "__main__":
    main()
