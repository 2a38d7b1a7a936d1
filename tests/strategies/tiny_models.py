"""Tiny random models of every architecture the library claims, in float64, and batches for them."""

import torch
import transformers as tf

VOCABULARY = 61
_SHARED = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
_LLAMA_LIKE = dict(_SHARED, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BERT_LIKE = dict(
    _SHARED, max_position_embeddings=64, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=2
)

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_LLAMA_LIKE),
    "qwen2": lambda: tf.Qwen2Config(**_LLAMA_LIKE),
    "qwen2-sliding": lambda: tf.Qwen2Config(**_LLAMA_LIKE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**_LLAMA_LIKE, head_dim=8),
    "mistral-sliding": lambda: tf.MistralConfig(**_LLAMA_LIKE, sliding_window=4),
    "gemma2": lambda: tf.Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=4, attn_implementation="eager"),
    "gemma3": lambda: tf.Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "phi3": lambda: tf.Phi3Config(**_LLAMA_LIKE, resid_pdrop=0.0, embd_pdrop=0.0),
    "olmo2": lambda: tf.Olmo2Config(**_LLAMA_LIKE),
    "smollm3": lambda: tf.SmolLM3Config(**_LLAMA_LIKE),
    "mixtral": lambda: tf.MixtralConfig(**_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0),
    "opt": lambda: tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, dropout=0.0, pad_token_id=1, word_embed_proj_dim=32),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SHARED, max_position_embeddings=64, pad_token_id=0),
    "bert": lambda: tf.BertConfig(**_BERT_LIKE),
    "roberta": lambda: tf.RobertaConfig(**_BERT_LIKE),
    "distilbert": lambda: tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, pad_token_id=1),
    "bart": lambda: tf.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, pad_token_id=1),
}
CAUSAL = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral-sliding", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "mixtral", "gpt2", "opt", "gpt_neox"]
MASKED = ["bert", "roberta", "distilbert"]

HEADS = {
    "causal_lm": tf.AutoModelForCausalLM,
    "masked_lm": tf.AutoModelForMaskedLM,
    "seq2seq": tf.AutoModelForSeq2SeqLM,
    "token_classification": tf.AutoModelForTokenClassification,
    "sequence_classification": tf.AutoModelForSequenceClassification,
    "question_answering": tf.AutoModelForQuestionAnswering,
}


def lm_head(name: str) -> str:
    return "causal_lm" if name in CAUSAL else "masked_lm" if name in MASKED else "seq2seq"


def tiny_model(name: str, head: str | None = None, dtype=torch.float64, seed: int = 0, **overrides):
    """A model in training mode. Weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in {"num_labels": 3, **overrides}.items():
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
    if head == "sequence_classification":
        batch["labels"] = torch.arange(rows) % 3
    if head == "question_answering":
        del batch["labels"]
        start = mask.argmax(1)
        batch |= {"start_positions": start + 2, "end_positions": start + 5}
    return batch
