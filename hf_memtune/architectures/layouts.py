"""How the layers of an architecture are laid out inside: where adapters go, and what makes one half of a layer do nothing.

Names are paths of submodules of one layer. A layout fits a layer that has all the modules it `needs`, and the first that fits holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Quiet = Callable[..., Any]
"""A forward in place of a module's own, by which the half of the layer that the module is in hands its input on."""


def same(x: Tensor, *args, **kwargs) -> Tensor:
    """Of norms, and of blocks with their residual inside."""
    return x


def nothing(x: Tensor, *args, **kwargs) -> Tensor:
    """Of blocks whose output is added to a residual."""
    return torch.zeros_like(x)


def residual(x: Tensor, residual_input: Tensor, *args, **kwargs) -> Tensor:
    """Of blocks that are given their residual as the second argument (BERT's)."""
    return residual_input


def attention_nothing(hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    """Of attention modules, which return their weights too."""
    return torch.zeros_like(hidden_states), None


def attention_same(hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    """Of attention blocks with their residual inside."""
    return hidden_states, None


def t5_attention_same(hidden_states: Tensor, *args, position_bias: Tensor | None = None, **kwargs):
    """Of T5's attention blocks, which return the position bias too."""
    return hidden_states, position_bias, None


@dataclass(frozen=True)
class Layout:
    """mlp_input, mlp_output: the module whose input an adapter parallel to the MLP gets, and the one to whose output it adds.
    attention_output: the module after which an adapter of the attention block comes.
    without_attention, without_mlp: modules, and what they do instead where the layer is to be its other half alone; the optional ones
    may be missing. Both empty: this layer has no such halves, for the reason `whole_because`.
    """

    needs: tuple[str, ...]
    mlp_input: str
    mlp_output: str
    attention_output: str
    without_attention: dict[str, Quiet] = field(default_factory=dict)
    without_mlp: dict[str, Quiet] = field(default_factory=dict)
    whole_because: str = ""

    def quieted(self, layer: nn.Module, modules: dict[str, Quiet]) -> list[tuple[nn.Module, Quiet]]:
        """The modules of one layer that are there, each with what it does instead."""
        return [(layer.get_submodule(name), quiet) for name, quiet in modules.items() if has(layer, name)]

    def fits(self, layer: nn.Module) -> bool:
        return all(has(layer, name) for name in self.needs)


def has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a submodule of that path."""
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


_FC = {"fc1": same, "fc2": nothing, "final_layer_norm": same}
_CROSS = {"encoder_attn": attention_nothing, "encoder_attn_layer_norm": same}
LAYOUTS: dict[str, Layout] = {
    "bert": Layout(  # RoBERTa, ELECTRA, ...: residuals and norms inside its blocks
        needs=("attention.output.dense", "intermediate", "output.dense"),
        mlp_input="intermediate", mlp_output="output.dense", attention_output="attention.output.dense",
        without_attention={"attention": attention_same, "crossattention": attention_same},
        without_mlp={"intermediate": same, "output": residual},
    ),
    "distilbert": Layout(
        needs=("attention.out_lin", "sa_layer_norm", "ffn", "output_layer_norm"),
        mlp_input="ffn", mlp_output="ffn", attention_output="attention.out_lin",
        without_attention={"attention": attention_nothing, "sa_layer_norm": same},
        without_mlp={"ffn": nothing, "output_layer_norm": same},
    ),
    "bart": Layout(  # OPT, Pegasus, M2M100, ...: norms before or after the blocks
        needs=("self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
        mlp_input="fc1", mlp_output="fc2", attention_output="self_attn.out_proj",
        without_attention={"self_attn": attention_nothing, "self_attn_layer_norm": same} | _CROSS,
        without_mlp=_FC,
    ),
    "t5-encoder": Layout(
        needs=("layer.0.SelfAttention.o", "layer.1.DenseReluDense"),
        mlp_input="layer.1.DenseReluDense", mlp_output="layer.1.DenseReluDense", attention_output="layer.0.SelfAttention.o",
        without_attention={"layer.0": t5_attention_same},
        without_mlp={"layer.1": same},
    ),
    "t5-decoder": Layout(
        needs=("layer.0.SelfAttention.o", "layer.1.EncDecAttention", "layer.2.DenseReluDense"),
        mlp_input="layer.2.DenseReluDense", mlp_output="layer.2.DenseReluDense", attention_output="layer.0.SelfAttention.o",
        without_attention={"layer.0": t5_attention_same, "layer.1": t5_attention_same},
        without_mlp={"layer.2": same},
    ),
    "gpt2": Layout(
        needs=("ln_1", "attn.c_proj", "ln_2", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="attn.c_proj",
        without_attention={"ln_1": same, "attn": attention_nothing, "ln_cross_attn": same, "crossattention": attention_nothing},
        without_mlp={"ln_2": same, "mlp": nothing},
    ),
    "gpt_neox": Layout(
        needs=("input_layernorm", "attention.dense", "post_attention_layernorm", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="attention.dense",
        without_attention={"input_layernorm": same, "attention": attention_nothing},
        without_mlp={"post_attention_layernorm": same, "mlp": nothing},
    ),
    "vit": Layout(  # DeiT too
        needs=("layernorm_before", "attention.o_proj", "layernorm_after", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="attention.o_proj",
        without_attention={"layernorm_before": same, "attention": attention_nothing},
        without_mlp={"layernorm_after": same, "mlp": nothing},
    ),
    "gemma2": Layout(  # Gemma 3: norms on both sides of each block
        needs=("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="self_attn.o_proj",
        without_attention={"input_layernorm": same, "self_attn": attention_nothing, "post_attention_layernorm": same},
        without_mlp={"pre_feedforward_layernorm": same, "mlp": nothing, "post_feedforward_layernorm": same},
    ),
    "olmo2": Layout(  # norms after each block, inside the residual
        needs=("self_attn.o_proj", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
        mlp_input="mlp", mlp_output="mlp", attention_output="self_attn.o_proj",
        without_attention={"self_attn": attention_nothing, "post_attention_layernorm": same},
        without_mlp={"mlp": nothing, "post_feedforward_layernorm": same},
    ),
    "llama": Layout(  # Qwen2, Qwen3, Mistral, Gemma, Phi3, ...
        needs=("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="self_attn.o_proj",
        without_attention={"input_layernorm": same, "self_attn": attention_nothing},
        without_mlp={"post_attention_layernorm": same, "mlp": nothing},
    ),
    "parallel": Layout(  # Cohere, ...: one norm before both blocks
        needs=("input_layernorm", "self_attn.o_proj", "mlp"),
        mlp_input="mlp", mlp_output="mlp", attention_output="self_attn.o_proj",
        whole_because="its attention and MLP run beside each other on the same input, not one after the other",
    ),
}  # fmt: skip

# Layers of BART's kind that end in a norm, by config.model_type: their modules are those of the ones that do not.
POST_NORM = frozenset({
    "bart", "plbart", "marian", "blenderbot-small", "mvp", "led", "prophetnet", "trocr", "informer", "autoformer", "time_series_transformer",
})  # fmt: skip
