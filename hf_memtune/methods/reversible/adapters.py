"""Adapters inside the layers of a model: put in, frozen around, taken out again.

They are submodules of their layer, under one name, so that optimizers, wrappers and checkpoints find them; the names of what was
there before stay as they are.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_memtune.architectures.layouts import Layout
from hf_memtune.architectures.stacks import LayerStack, unwrapped
from hf_memtune.core.adapter import Adapter
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.settings.protocol import filled_in
from hf_memtune.settings.reversible import ReversibleConfig

ADAPTERS = "reversible_adapters"
PLACES = {"centred": ("mlp",), "meft1": ("mlp", "coupling"), "meft2": ("mlp", "coupling"), "meft3": ("mlp", "attention")}
"""By coupling: adapters parallel to the MLP, after the attention, and the one that is a half step by itself, of reversible layers alone."""


class Switch:
    """What acts at present: the reversible coupling at all, and which adapters beside the blocks of a layer."""

    def __init__(self):
        self.is_on = True
        self.places: tuple[str, ...] = ("attention", "mlp")

    @contextmanager
    def only(self, *places: str) -> Iterator[None]:
        """Of the adapters beside blocks, let these alone act."""
        before, self.places = self.places, places
        try:
            yield
        finally:
            self.places = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was."""
        before, self.is_on = self.is_on, False
        try:
            with self.only():
                yield
        finally:
            self.is_on = before


class BesideBlock:
    """Hooks of one adapter, which adds to a module's output what it makes of an earlier module's input, or of that output itself."""

    def __init__(self, adapter: nn.Module, place: str, switch: Switch):
        self.adapter, self.place, self.switch = adapter, place, switch
        self._seen: Tensor | None = None

    @property
    def acts(self) -> bool:
        return self.place in self.switch.places

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.acts:
            self._seen = args[0] if args else kwargs["hidden_states"]

    def add_seen(self, module: nn.Module, args: tuple, output: Any) -> Any:
        seen, self._seen = self._seen, None
        if not self.acts:
            return output
        if isinstance(output, tuple):  # what routers of experts found comes beside it
            return output[0] + self.adapter(seen), *output[1:]
        return output + self.adapter(seen)

    def add_own(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self.adapter(output) if self.acts else output


def places_of(coupling: str, is_reversible: bool) -> tuple[str, ...]:
    """Where one layer has adapters: a parameter that is never used would hold up distributed training."""
    return tuple(place for place in PLACES[coupling] if is_reversible or place != "coupling")


def put_adapters(
    layer: nn.Module, layout: Layout, config: ReversibleConfig, places: tuple[str, ...], switch: Switch, undo: ExitStack
) -> None:
    """Give one layer adapters at these places; `switch` says which of them act. What takes them out goes to `undo`."""
    layer.add_module(ADAPTERS, _adapters(layer, layout, config, places))
    undo.callback(delattr, layer, ADAPTERS)
    for place, adapter in adapters_of(layer).items():
        beside = BesideBlock(adapter, place, switch)
        if place == "mlp":
            source, target = layer.get_submodule(layout.mlp_input), layer.get_submodule(layout.mlp_output)
            undo.callback(source.register_forward_pre_hook(beside.see, with_kwargs=True).remove)
            undo.callback(target.register_forward_hook(beside.add_seen).remove)
        elif place == "attention":
            undo.callback(layer.get_submodule(layout.attention_output).register_forward_hook(beside.add_own).remove)


def _adapters(layer: nn.Module, layout: Layout, config: ReversibleConfig, places: tuple[str, ...]) -> nn.ModuleDict:
    weight = next(p for p in layer.get_submodule(layout.mlp_output).parameters())
    width = _width(layer, layout)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rank, activation = filled_in(config.adapter_rank), filled_in(config.adapter_activation)
    dropout, std = filled_in(config.adapter_dropout), filled_in(config.adapter_init_std)
    made = {place: Adapter(width, rank, activation, dropout, std, weight.device, dtype) for place in places}
    return nn.ModuleDict(made).train(layer.training)


def adapters_of(layer: nn.Module) -> nn.ModuleDict:
    """Those that were put into a layer, by place."""
    found = layer.get_submodule(ADAPTERS)
    assert isinstance(found, nn.ModuleDict)
    return found


def _width(layer: nn.Module, layout: Layout) -> int:
    """Channels of the hidden states: what the attention's last linear layer returns."""
    linear: Any = layer.get_submodule(layout.attention_output)
    width = getattr(linear, "out_features", None) or getattr(linear, "nf", None)  # nf: of GPT-2's Conv1D
    return width if width is not None else linear.get_base_layer().nf


def refuse_adapters_without_a_wrapper(model: nn.Module) -> None:
    """Those that `model.add_adapter` has put in would be frozen, and Trainer cannot resume them."""
    if model is unwrapped(model) and getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__}: got PEFT adapters that were put in by add_adapter, beside which adapters of reversible layers (adapter_rank) "
            "would be all that is trained. Put them in with peft.get_peft_model(model, config), and both are; or set adapter_rank=0."
        )


def freeze_but(model: nn.Module, trained: Iterable[nn.Parameter], undo: ExitStack) -> None:
    """Only these parameters, and what a PEFT wrapper trains, require grad; after `undo` those that did."""
    wanted = {id(p) for p in trained}
    if model is not unwrapped(model):
        wanted |= {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
        parameter.requires_grad_(id(parameter) in wanted)


def trained_parameters(model: nn.Module, stacks: Iterable[LayerStack], config: ReversibleConfig) -> list[nn.Parameter]:
    """Of the adapters, and of the head where it is to be trained. Without adapters: none, for then nothing is chosen here."""
    if not config.adapter_rank:
        return []
    found = [p for stack in stacks for layer in stack.layers for p in adapters_of(layer).parameters()]
    head_model = unwrapped(model)
    trains_head = config.train_head if config.train_head is not None else head_model.get_output_embeddings() is None
    return found + (head_parameters(head_model) if trains_head else [])


def head_parameters(head_model: PreTrainedModel) -> list[nn.Parameter]:
    """What follows the body: the pooler of the body, and all that is not in it. Where the body is the model: the output embeddings."""
    base = head_model.base_model
    if base is head_model:
        output = head_model.get_output_embeddings()
        return [] if output is None else list(output.parameters())
    in_body = {id(p) for name, p in base.named_parameters() if not name.startswith("pooler.")}
    return [p for name, p in head_model.named_parameters() if id(p) not in in_body and not is_put_aside(name)]


def is_put_aside(name: str) -> bool:
    """Whether a parameter is of a module that PEFT trains a copy of (modules_to_save): it does not run, and may be random, as new heads are."""
    return "original_module" in name.split(".")
