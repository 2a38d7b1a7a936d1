"""The slow, obviously right twin of token ditching: a full forward in which everything of unselected tokens is detached."""

import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def keep_gradient(values, kept, dim):
    """`values` with the gradient cut at the tokens (along `dim`) that are not kept (batch, tokens)."""
    shape = [1] * values.dim()
    shape[0], shape[dim] = kept.shape
    return torch.where(kept.view(shape), values, values.detach())


@contextmanager
def ditching(model, kept):
    """`kept`: {"decoder": (B, T) bool, "encoder": ...}. Hidden states, keys and values of the others become constants."""
    base = model.base_model if model.base_model is not model else model.model  # Llama 4's prefix names no part of it
    if model.config.model_type == "opt":
        base = base.decoder  # the head calls it directly
    encoder = base.encoder if model.config.is_encoder_decoder else None
    in_encoder = {id(m) for m in encoder.modules()} if encoder is not None else set()
    kernel = model.config._attn_implementation
    hooks = []

    def stack_of(module, name=""):
        return "encoder" if id(module) in in_encoder else "decoder"

    cross = {id(m) for n, m in base.named_modules() if n.endswith("encoder_attn")}

    def attention(module, query, key, value, attention_mask, **kwargs):
        keys = kept["encoder" if id(module) in cross else stack_of(module)]
        run = ALL_ATTENTION_FUNCTIONS[kernel] if kernel != "eager" else sys.modules[type(module).__module__].eager_attention_forward
        return run(module, query, keep_gradient(key, keys, 2), keep_gradient(value, keys, 2), attention_mask, **kwargs)

    AttentionInterface.register("twin", attention)
    AttentionMaskInterface.register("twin", ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            tokens = kept[stack_of(module)]

            def cut_input(module, args, kwargs, tokens=tokens):
                if args:
                    return (keep_gradient(args[0], tokens, 1), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": keep_gradient(kwargs["hidden_states"], tokens, 1)}

            hooks.append(module.register_forward_pre_hook(cut_input, with_kwargs=True))

    def cut_output(module, args, output):
        output.last_hidden_state = keep_gradient(output.last_hidden_state, kept["decoder"], 1)
        return output

    hooks.append(base.register_forward_hook(cut_output))
    previous = model.config._attn_implementation
    model.config._attn_implementation = "twin"
    try:
        yield
    finally:
        model.config._attn_implementation = previous
        for hook in hooks:
            hook.remove()
        AttentionInterface._global_mapping.pop("twin")
        AttentionMaskInterface._global_mapping.pop("twin")


def shifted(labels):
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def twin_loss(model, batch, kept, causal_lm):
    """Mean loss over kept, labelled tokens of the detached full forward."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    with ditching(model, kept):
        logits = model(**inputs).logits
    target = shifted(batch["labels"]) if causal_lm else batch["labels"]
    target = target.masked_fill(~kept["decoder"], -100)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def worst_difference(found, expected):
    """Largest relative difference of any parameter's gradient; parameters missing on one side count as different."""
    largest = max(g.norm() for g in expected.values())
    differences = [
        (found.get(name, torch.zeros_like(g)) - g).norm() / _scale(name, expected).clamp_min(1e-4 * largest) for name, g in expected.items()
    ]
    extra = [g.norm() / largest for name, g in found.items() if name not in expected]
    return max(map(float, differences + extra))


def _scale(name, expected):
    """The norm that a gradient's difference is relative to: its own, and for a bias at least that of a column of its weight.

    A bias is one more column, whose input is 1: both sum the same numbers over the tokens, and round alike. Where the bias' sum
    cancels, all that is left of it is rounding: softmax does not see one number added to every key, so without rotation the
    bias of keys has no gradient at all.
    """
    own = expected[name].norm()
    weight = expected.get(f"{name.removesuffix('bias')}weight") if name.endswith("bias") else None
    if weight is None or weight.dim() != 2:
        return own
    columns = weight.numel() / expected[name].numel()
    return torch.maximum(own, weight.norm() / columns**0.5)
