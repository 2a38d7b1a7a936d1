"""Facts about architectures that the modules themselves do not tell. Everything else is found by looking at the model."""

# How a model numbers its tokens when no position_ids are given, by config.model_type. Unlisted: 0, 1, 2, ... over the row.
POSITION_RULES = {
    # counted over real tokens only: cumulative sum of the attention mask, minus 1
    "opt": "attention_mask",
    # counted over tokens that are not the padding token, from padding_idx + 1
    "roberta": "padding_idx",
    "roberta-prelayernorm": "padding_idx",
    "xlm-roberta": "padding_idx",
    "xlm-roberta-xl": "padding_idx",
    "camembert": "padding_idx",
    "data2vec-text": "padding_idx",
    "mpnet": "padding_idx",
    "xmod": "padding_idx",
}

# Position embeddings of models whose forward takes no position_ids: called with ids of which only the shape matters.
POSITION_MODULE_NAMES = ("embed_positions",)

# Causal models whose own loss takes labels as they are, the i-th for the i-th token's prediction: decoders of encoder-decoder models, XLM, XLNet and CPM-Ant.
UNSHIFTED = (
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "ProphetNetForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
)

# What makes one vector of a row from its last hidden states, by its name in the body.
POOLER_NAME = "pooler"

# Linear layers that classify every token, by their name in the model around the body.
CLASSIFIER_NAMES = ("classifier", "score")

# How many tokens of a row, or of a batch, an expert takes before it takes no more: an attribute of routers that count them.
CAPACITY_NAME = "expert_capacity"

# A layer by its name in torch's wrapper around it (torch.distributed.algorithms), which checkpoints its activations.
CHECKPOINTED = "_checkpoint_wrapped_module"

# Attention of a decoder over the encoder's states, by a part of the module's name.
CROSS_ATTENTION_NAMES = ("encoder_attn", "crossattention", "cross_attn", "cross_attention", "EncDecAttention")

# Rotary embeddings whose frequencies change with the longest position in the batch, once it passes the pre-trained length.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# What to do with a model on which ditching would not be exact.
REMEDY = "Train this model with activation checkpointing instead (--activation_checkpointing)."
OF_TRL = " (trainers of trl turn it on unless their arguments have router_aux_loss_coef=0.0)"  # behind output_router_logits
NO_ATTENTION_REMEDY = (
    "Token seeking and streaming follow what a layer knows of earlier tokens through transformers' attention interface, or a cache: keys and "
    f"values, or a state. {REMEDY}"
)
