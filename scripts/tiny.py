"""A tiny random model of any type that the installed transformers has: `tiny("qwen3_next", "causal")`.

Every config is shrunk alike, by the names of its fields; TABLE holds what a type needs besides. Windows are shorter than the rows.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

VOCABULARY, TOKENS, WINDOW, LARGEST = 97, 24, 8, 8_000_000  # LARGEST: parameters of what still counts as tiny
KINDS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
}

_NAMES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    32: "hidden_size embedding_dim d_model n_embd dim emb_dim word_embed_proj_dim embedding_size attention_hidden_size embed_dim encoder_hidden_size lru_width "
    "decoder_hidden_size cross_attention_hidden_size d_embed kda_hidden_size output_hidden_size projection_dim out_hidden_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_hidden_layers n_layer n_layers num_layers "
    "encoder_layers decoder_layers num_decoder_layers num_encoder_layers num_experts num_local_experts n_routed_experts moe_num_experts "
    "linear_num_value_heads num_linear_attention_heads encoder_num_hidden_layers decoder_num_hidden_layers num_encoder_attention_heads "
    "num_decoder_attention_heads swa_num_attention_heads linear_num_heads kda_num_heads rope_head_dim qk_rope_head_dim depth index_topk index_block_size",
    2: "num_key_value_heads linear_num_key_heads mamba_n_groups n_groups num_experts_per_tok num_kv_heads top_k num_global_key_value_heads "
    "num_experts_per_token moe_topk eos_token_id num_attention_groups moe_k num_query_groups swa_num_key_value_heads n_kv_heads index_topk_heads",
    1: "n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts pad_token_id num_dense_layers num_mem_blocks "
    "num_nextn_predict_layers first_k_dense moe_num_shared_experts index_topk_blocks index_local_blocks",
    48: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size shared_intermediate_size "
    "shared_expert_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size mlp_hidden_size dense_intermediate_size",
    16: "moe_intermediate_size expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size hidden_size_per_layer_input "
    "moe_latent_size",
    8: "head_dim d_kv linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_d_head mamba_d_state mamba_head_dim mamba_num_heads "
    "ssm_state_size state_size q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim global_head_dim swa_head_dim attention_head_dim d_head "
    "kv_channels linear_head_dim key_head_dim value_head_dim kda_head_dim attn_rotary_emb time_step_rank mamba_dt_rank index_head_dim n_mamba_heads mamba_headdim index_n_heads",
    64: "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_seq_length max_target_positions max_source_positions",
}
_WINDOWS = (
    "sliding_window attention_chunk_size attention_window_size local_attention window_size sliding_window_size chunk_size mamba_chunk_size"
)
_VALUES: dict[str, Any] = {name: number for number, names in _NAMES.items() for name in names.split()} | dict.fromkeys(
    _WINDOWS.split(), WINDOW
)
_VALUES |= {"use_cache": True, "is_decoder": True}
_PAIRS = (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"), ("rotary_dim", "head_dim"))
"""Fields that are equal where they are equal by default."""

_TWO_ROPES = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")}
TABLE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": _TWO_ROPES},
    "cpmant": {"dim_ff": 48, "prompt_length": 4, "dim_head": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "+rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"+per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "altup_num_inputs": 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8,
        "ngram_vocab_size_base": VOCABULARY, "ple_embed_dim": 32,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 6)},
    "roc_bert": {"shape_vocab_size": 50, "shape_embed_dim": 8, "pronunciation_vocab_size": 50, "pronunciation_embed_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "num_mem_blocks": None},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By type: fields of the config, or of its text config, that the names alone do not settle. None: left as it is by default. After a plus: what the class takes and does not name."""


def types(kind: str) -> list[str]:
    """Types of the installed transformers that have a head of this kind."""
    return sorted(name for name in KINDS[kind][0] if name in transformers.CONFIG_MAPPING)


def tiny_config(name: str, kind: str = "causal", **more: Any) -> Any:
    """The shrunk config of a type."""
    return _small(transformers.CONFIG_MAPPING[name], kind, TABLE.get(name, {}) | more)


def tiny(name: str, kind: str = "causal", dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> nn.Module:
    """A model in training mode, without dropout. Raises ValueError where it is not tiny."""
    config = tiny_config(name, kind, **more)
    attention = {"attn_implementation": more["attn_implementation"]} if "attn_implementation" in more else {}
    with torch.device("meta"):
        size = sum(p.numel() for p in KINDS[kind][1].from_config(config, **attention).parameters())
    if size > LARGEST:
        raise ValueError(f"{name}: {size:,} parameters are not tiny. Put its fields into TABLE.")
    torch.manual_seed(seed)
    model = KINDS[kind][1].from_config(config, dtype=dtype, **attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if type(module).__name__.endswith("Router"):  # Phi-MoE draws the experts of a token at random
            module.eval()
    return model


def batch_of(model: nn.Module, kind: str, padding: str | None = None, rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Two rows of TOKENS tokens, of which the second is padded on the `padding` side ("left", "right"; None: no padding, and no mask)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY - 6, (rows, TOKENS), generator=generator)
    labels = ids.clone() if kind == "causal" else torch.randint(5, VOCABULARY - 6, (rows, TOKENS), generator=generator)
    batch = {"input_ids": ids, "labels": labels}
    if padding is not None:
        mask = torch.ones_like(ids)
        mask[-1, -7:] = 0
        mask = mask.flip(1) if padding == "left" else mask
        pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
        labels = labels.masked_fill(mask == 0, -100)
        if kind == "causal" or not model.config.is_encoder_decoder and kind == "seq2seq":
            labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding would predict
        batch = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask, "labels": labels}
    if kind == "seq2seq" and model.config.is_encoder_decoder:
        batch["labels"] = labels.roll(3, 1)[:, :-5].contiguous()
        batch["decoder_input_ids"] = batch["labels"].roll(1, 1).clamp_min(0)
    return batch


def _small(config_class: type, kind: str, given: dict[str, Any]) -> Any:
    fields = inspect.signature(config_class).parameters
    default = config_class()
    chosen = {k: v for k, v in _VALUES.items() if k in fields and _fits(_default(default, k), v)}
    chosen |= {k: 0.0 for k, p in fields.items() if "drop" in k and isinstance(p.default, float)}
    chosen |= {one: chosen[other] for one, other in _PAIRS if one in chosen and other in chosen and _alike(default, one, other)}
    if kind != "causal" or config_class.model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        chosen.pop("is_decoder", None)
    for name in getattr(config_class, "sub_configs", {}):
        if (inner := getattr(default, name, None)) is not None and name in fields:
            chosen[name] = _small(type(inner), kind, TABLE.get(inner.model_type, {}) | given.get(name, {})).to_dict()
    if isinstance(kinds := getattr(default, "layer_types", None), list) and "layer_types" in fields and "layer_types" not in given:
        chosen["layer_types"] = _sampled(kinds, chosen.get("num_hidden_layers", 4))
    chosen |= {k: v for k, v in given.items() if k in fields and k not in getattr(config_class, "sub_configs", {})}
    chosen |= {k.removeprefix("+"): v for k, v in given.items() if k.startswith("+")}
    return config_class(**{k: v for k, v in chosen.items() if v is not None}, experts_implementation="eager")


def _alike(default: Any, one: str, other: str) -> bool:
    return _default(default, one) == _default(default, other)


def _default(config: Any, name: str) -> Any:
    """A field by default; a list stands for one that differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own class is not public
        return []


def _fits(default: Any, value: Any) -> bool:
    """A switch or a list under a known name is not a number."""
    return default is None or isinstance(default, (int, float, str)) and isinstance(default, (bool, str)) == isinstance(value, (bool, str))


def _sampled(kinds: list[str], count: int) -> list[str]:
    """As many layers, of every kind that there is."""
    first = kinds[:count]
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in first]
    return (first[: count - len(missing)] + missing)[:count] if missing else first
