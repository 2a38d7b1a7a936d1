"""The stacks of layers of any model, found by type. Nothing of the model is changed here."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_memtune.architectures.layouts import LAYOUTS, POST_NORM, Layout, has
from hf_memtune.architectures.tables import CROSS_ATTENTION_NAMES, OF_TRL, REMEDY
from hf_memtune.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerStack:
    """Layers that run one after another. name: path of their list in the model. is_post_norm: each layer ends in a norm."""

    name: str
    layers: tuple[nn.Module, ...]
    config: Any
    is_post_norm: bool

    def layout(self, use: str) -> Layout:
        """The layout of the layers. Raises UnsupportedModelError, which names what it was to be used for."""
        for layout in LAYOUTS.values():
            if all(layout.fits(layer) for layer in self.layers):
                return layout
        children = ", ".join(name for name, _ in self.layers[0].named_children())
        raise UnsupportedModelError(
            f"{self.name}: how {type(self.layers[0]).__name__} (with {children}) is laid out is not known, which {use} needs. Expected the "
            f"layout of one of: {', '.join(LAYOUTS)}. Use reversible=centred with adapter_rank=0 and LoRA inside the layers."
        )

    def halves(self) -> Layout:
        """The layout, of layers that are an attention block and then an MLP. Raises UnsupportedModelError for others."""
        layout = self.layout("reversible=meft3")
        reason = layout.whole_because
        if any(getattr(layer, "use_parallel_residual", False) for layer in self.layers):
            reason = LAYOUTS["parallel"].whole_because
        if reason:
            raise UnsupportedModelError(
                f"{self.name}: {type(self.layers[0]).__name__} cannot be split for reversible=meft3: {reason}. Use centred, meft1 or meft2."
            )
        return layout


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper."""
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(found, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model (expected a PreTrainedModel, or a PEFT model around one)."
        )
    return found


def layer_stacks(model: nn.Module) -> list[LayerStack]:
    """Every list of two layers or more that can be checkpointed, which is how transformers marks the layers of a stack."""
    head_model = unwrapped(model)
    found = [
        LayerStack(name, tuple(module), owner := _owner(head_model, name), _is_post_norm(owner, module[0]))
        for name, module in head_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(head_model).__name__}: found no stack of two or more transformer layers (a ModuleList of GradientCheckpointingLayer). "
            f"With fewer there is nothing to save. {REMEDY}"
        )
    _refuse_shared_layers(head_model, found)
    return found


def refuse_what_does_not_run_twice(model: nn.Module) -> None:
    """Refuse a model whose layers do not all run, once each, or from inside which something is handed out."""
    head_model = unwrapped(model)
    name = type(head_model).__name__
    kind = str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).rpartition(".")[2]
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise UnsupportedModelError(
            f"{name} with peft_type={kind}: its learned keys and values come in a cache, whose gradient a layer that runs twice by itself would "
            "lose. Use adapters or LoRA inside the layers."
        )
    for config in _configs(head_model):
        for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if (value := getattr(config, key, 0)) and value > 0:
                raise UnsupportedModelError(f"{name} with config.{key}={value}: layers are left out at random. Set config.{key} = 0.")
        for key, what, by in (
            ("output_router_logits", "the auxiliary loss of its routers", OF_TRL),
            ("output_attentions", "attention weights", ""),
        ):
            if getattr(config, key, False):
                raise UnsupportedModelError(
                    f"{name} with config.{key}=True: {what} would come from inside the layers, without a gradient. Set "
                    f"config.{key} = False{by}."
                )
        if shared := getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{name} with config.num_kv_shared_layers={shared}: layers read keys and values of other layers, whose gradient a layer that runs "
                f"twice by itself would lose. {REMEDY}"
            )
    for stack in layer_stacks(model):
        if 0 < sum(crossing := [_attends_elsewhere(layer) for layer in stack.layers]) < len(crossing):
            raise UnsupportedModelError(
                f"{name}: {stack.name}.{crossing.index(True)} attends to something that is not text, and does not run where there is none, so that not all "
                f"layers run once a pass. {REMEDY}"
            )
    for path, module in head_model.named_modules():
        if isinstance(dropped := getattr(module, "layerdrop", 0), float) and dropped > 0:
            raise UnsupportedModelError(f"{name}: {path}.layerdrop={dropped}: layers are left out at random. Set it to 0.")


def _attends_elsewhere(layer: nn.Module) -> bool:
    return any(name in CROSS_ATTENTION_NAMES for name, _ in layer.named_children())


def refuse_several_devices(model: nn.Module) -> None:
    """Refuse a model that is spread over devices, on which the two streams of one layer would lie apart."""
    devices = set((getattr(unwrapped(model), "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{type(unwrapped(model)).__name__} is spread over {', '.join(map(str, sorted(devices, key=str)))} by its device_map, expected "
            "one device a process. Load it without device_map, and launch with plain data parallelism or FSDP2."
        )


def _refuse_shared_layers(head_model: nn.Module, stacks: list[LayerStack]) -> None:
    layers = [layer for stack in stacks for layer in stack.layers]
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModelError(
            f"{type(head_model).__name__}: one layer stands in several places of a stack, so it does not run once a pass. {REMEDY}"
        )


def _configs(head_model: nn.Module) -> list:
    found = {id(m.config): m.config for m in head_model.modules() if getattr(m, "config", None) is not None}
    return list(found.values())


def _owner(head_model: nn.Module, name: str) -> Any:
    """The config of the innermost model around a stack."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(module := head_model.get_submodule(name), PreTrainedModel):
            return module.config
    return head_model.config


def _is_post_norm(config: Any, layer: nn.Module) -> bool:
    """Whether a layer ends in a norm. All others add to a residual stream that no norm has touched."""
    if (before := getattr(layer, "do_layer_norm_before", None)) is not None:  # OPT
        return not before
    if has(layer, "output.LayerNorm") or has(layer, "output_layer_norm"):  # BERT's kind, where X-MOD says which; DistilBERT
        return not getattr(layer, "pre_norm", False)
    return config.model_type in POST_NORM
