"""Models without weights: from a config, on the meta device, whole or in 4 bits; and the shapes of batches for them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.errors import ConfigError

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Of each input of a micro-batch, by name: shape and dtype."""

NF4_BLOCK, SCALE_BLOCK = 64, 256  # bitsandbytes: elements of a scale, and scales of a scale of scales


def blank_model(config: PreTrainedConfig, dtype: torch.dtype | None = None, auto: Any = None) -> nn.Module:
    """The model of `config` on the meta device: no weights are made, read or fetched.

    dtype: of the weights; None: what the config says, else float32. auto: an Auto class; None: the class that the config's
    `architectures` names, else a causal language model.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    auto = auto or (_Named(named) if named is not None else AutoModelForCausalLM)
    with torch.device("meta"):
        try:
            return auto.from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
        except ImportError as error:  # of a kernel
            what = f"got {config._attn_implementation!r}, which is not installed here ({error})"
            raise ConfigError([f"attn_implementation: {what}. Expected sdpa, whose bytes are the same but for masks."]) from error
        except ValueError as error:
            raise ConfigError([f"model: no model can be made of a {type(config).__name__}: {error}"]) from error


class _Named:
    """A model class, called as an Auto class is."""

    def __init__(self, kind: type):
        self.kind = kind

    def from_config(self, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
        return self.kind._from_config(config, dtype=dtype)


def in_four_bits(model: nn.Module, quantization: Any) -> nn.Module:
    """The linear layers of a blank model, all that transformers would, as bitsandbytes keeps them: packed NF4 with scales.

    quantization: a BitsAndBytesConfig. n elements take n / 2 bytes and n / 64 scales of 4 bytes; with double quantization of 1 byte, and
    n / 64 / 256 scales of 4 bytes for those (QLoRA, arXiv 2305.14314, section 3).
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    whole = HfQuantizer.get_modules_to_not_convert(model, quantization.llm_int8_skip_modules, model._keep_in_fp32_modules)
    compute = next(model.parameters()).dtype
    replace_with_bnb_linear(model, modules_to_not_convert=whole, quantization_config=quantization)
    with torch.device("meta"):
        for module in model.modules():
            if isinstance(module, Linear4bit):
                state = _quant_state((module.out_features, module.in_features), compute, quantization)
                packed = torch.empty(math.ceil(math.prod(state.shape) / 2), 1, dtype=torch.uint8)
                module.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _quant_state(shape: tuple[int, int], dtype: torch.dtype, quantization: Any) -> Any:
    from bitsandbytes.functional import QuantState

    scales = math.ceil(math.prod(shape) / NF4_BLOCK)
    nested = quantization.bnb_4bit_use_double_quant
    absmax = torch.empty(scales, dtype=torch.uint8 if nested else torch.float32)
    state2 = QuantState(torch.empty(math.ceil(scales / SCALE_BLOCK)), code=torch.empty(256), blocksize=SCALE_BLOCK, dtype=torch.float32)
    return QuantState(
        absmax,
        torch.Size(shape),
        torch.empty(16),
        NF4_BLOCK,
        quantization.bnb_4bit_quant_type,
        dtype,
        torch.empty(()) if nested else None,
        state2 if nested else None,
    )


def batch_shapes(model: nn.Module, rows: int, tokens: int) -> Shapes:
    """What the collators of transformers give a model of this kind, for `rows` rows of `tokens` tokens."""
    head_model = unwrapped(model)
    grid, taken = ((rows, tokens), torch.long), inspect.signature(type(head_model).forward).parameters
    found: Shapes = {"input_ids": grid, "attention_mask": grid}
    if "token_type_ids" in taken and getattr(head_model.config, "type_vocab_size", 0) > 1:
        found["token_type_ids"] = grid
    name = type(head_model).__name__
    if name.endswith("ForQuestionAnswering"):
        return found | dict.fromkeys(("start_positions", "end_positions"), ((rows,), torch.long))
    if name.endswith("ForSequenceClassification"):
        return found | {"labels": _labels_of_rows(head_model.config, rows)}
    if head_model.config.is_encoder_decoder:
        found["decoder_input_ids"] = grid
    return found | {"labels": grid}


def _labels_of_rows(config: PreTrainedConfig, rows: int) -> tuple[tuple[int, ...], torch.dtype]:
    """The number of a class, or values: one or several to predict, or one a class where a row may have several."""
    has_values = config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1
    shape = (rows, config.num_labels) if has_values and config.num_labels > 1 else (rows,)
    return shape, torch.float32 if has_values else torch.long
