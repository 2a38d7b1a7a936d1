"""Tiny random models of every architecture the library claims, in float64, and batches for them."""

import torch
import transformers as tf

VOCABULARY = 61
_SHARED = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
_LLAMA_LIKE = dict(_SHARED, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BERT_LIKE = dict(
    _SHARED, max_position_embeddings=64, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=2
)
_BART_LIKE = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    dropout=0.0,
)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_LLAMA_LIKE),
    "qwen2": lambda: tf.Qwen2Config(**_LLAMA_LIKE),
    "qwen2-sliding": lambda: tf.Qwen2Config(**_LLAMA_LIKE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**_LLAMA_LIKE, head_dim=8),
    "mistral-sliding": lambda: tf.MistralConfig(**_LLAMA_LIKE, sliding_window=4),
    "gemma2": lambda: tf.Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=4, attn_implementation="eager"),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_LLAMA_LIKE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: tf.Phi3Config(**_LLAMA_LIKE, resid_pdrop=0.0, embd_pdrop=0.0),
    "olmo2": lambda: tf.Olmo2Config(**_LLAMA_LIKE),
    "smollm3": lambda: tf.SmolLM3Config(**_LLAMA_LIKE),
    "mixtral": lambda: tf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=1,
        word_embed_proj_dim=32,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SHARED, max_position_embeddings=64, pad_token_id=0),
    "bert": lambda: tf.BertConfig(**_BERT_LIKE),
    "roberta": lambda: tf.RobertaConfig(**_BERT_LIKE),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=48,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
    ),
    "bart": lambda: tf.BartConfig(**_BART_LIKE, pad_token_id=1),
}
# Each has something that the ones above have not: chunked attention and rotary embeddings in complex numbers; sinks; a scaled
# head; values of another size than keys; a mask that attention is given by its name; local layers in an encoder; positions from a shape, and from where padding is.
FURTHER = {
    "llama4": lambda: tf.Llama4TextConfig(**_LLAMA_LIKE, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48),
    "gpt-oss": lambda: tf.GptOssConfig(
        **_LLAMA_LIKE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, experts_implementation="eager"
    ),
    "afmoe": lambda: tf.AfmoeConfig(
        **_LLAMA_LIKE | {"num_hidden_layers": 4},
        head_dim=8,
        moe_intermediate_size=16,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        sliding_window=4,
        global_attn_every_n_layers=2,
        experts_implementation="eager",
    ),
    "cohere2": lambda: tf.Cohere2Config(**_LLAMA_LIKE, sliding_window=4),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **_LLAMA_LIKE | {"num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        experts_implementation="eager",
    ),
    "modernbert": lambda: tf.ModernBertConfig(
        **_SHARED,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=3,
        sep_token_id=4,
        local_attention=4,
        global_attn_every_n_layers=2,
    ),
    "pegasus": lambda: tf.PegasusConfig(**_BART_LIKE, pad_token_id=0, decoder_start_token_id=0),
    "m2m100": lambda: tf.M2M100Config(**_BART_LIKE, pad_token_id=1, encoder_layerdrop=0.0, decoder_layerdrop=0.0, attention_dropout=0.0),
}
CONFIGS |= FURTHER
CAUSAL = [
    "llama",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "mistral-sliding",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "smollm3",
    "mixtral",
    "gpt2",
    "opt",
    "gpt_neox",
]
MASKED = ["bert", "roberta", "distilbert"]

HEADS = {
    "causal_lm": tf.AutoModelForCausalLM,
    "masked_lm": tf.AutoModelForMaskedLM,
    "seq2seq": tf.AutoModelForSeq2SeqLM,
    "token_classification": tf.AutoModelForTokenClassification,
    "sequence_classification": tf.AutoModelForSequenceClassification,
    "question_answering": tf.AutoModelForQuestionAnswering,
}


# Heads have dropouts of their own, some of 0.1 where the config names none.
_NO_HEAD_DROPOUT = {"classifier_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}


def lm_head(name: str) -> str:
    if name in (*MASKED, "modernbert"):
        return "masked_lm"
    return "seq2seq" if name in ("bart", "pegasus", "m2m100") else "causal_lm"


def tiny_model(name: str, head: str | None = None, dtype=torch.float64, seed: int = 0, **overrides):
    """A model in training mode. Weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in {"num_labels": 3, **_NO_HEAD_DROPOUT, **overrides}.items():
        setattr(config, key, value)
    model = HEADS[head or lm_head(name)].from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def batch_for(model, head: str | None = None, lengths=(13, 9), side="right", seed: int = 1):
    """Rows of different lengths, padded on one side, with labels for the head."""
    generator = torch.Generator().manual_seed(seed)
    width, rows = max(lengths), len(lengths)
    ids = torch.randint(5, VOCABULARY, (rows, width), generator=generator)
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    if side == "left":
        mask = mask.flip(1)
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    labels = torch.randint(5, VOCABULARY, (rows, width), generator=generator)
    if head in (None, "causal_lm"):
        labels = ids.clone()
    if head == "token_classification":
        labels = labels % 3
    batch["labels"] = labels.masked_fill(mask == 0, -100)
    if head == "masked_lm":
        batch["labels"][:, ::3] = -100
    if head == "seq2seq":
        batch["labels"] = torch.randint(5, VOCABULARY, (rows, 11), generator=generator)
        batch["labels"][-1, 7:] = -100
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            batch["decoder_input_ids"] = batch["labels"].roll(1, 1).clamp_min(model.config.pad_token_id)
    if head == "sequence_classification":
        batch["labels"] = torch.arange(rows) % 3
    if head == "question_answering":
        del batch["labels"]
        start = mask.argmax(1)
        batch |= {"start_positions": start + 2, "end_positions": start + 5}
    return batch
