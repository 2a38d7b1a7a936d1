"""Look at a model and say what it is made of. Nothing of the model is changed here."""

import inspect
import sys
from dataclasses import dataclass, field
from enum import Enum

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto

from hf_memtune.architectures import tables
from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.errors import UnsupportedModelError


class Task(Enum):
    """What a head is trained for, and so which tokens carry the loss."""

    CAUSAL_LM = "causal language modelling"
    MASKED_LM = "masked language modelling"
    SEQ2SEQ_LM = "sequence-to-sequence language modelling"
    TOKEN_CLASSIFICATION = "token classification"
    SEQUENCE_CLASSIFICATION = "sequence classification"
    QUESTION_ANSWERING = "question answering"

    @property
    def loss_per_token(self) -> bool:
        """Whether every token has a loss of its own, so that the loss can be taken at the kept tokens alone."""
        return self not in (Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING)


_TASK_MAPPINGS = (
    (Task.SEQ2SEQ_LM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (Task.CAUSAL_LM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (Task.MASKED_LM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (Task.TOKEN_CLASSIFICATION, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    (Task.SEQUENCE_CLASSIFICATION, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    (Task.QUESTION_ANSWERING, modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
)


@dataclass(frozen=True)
class Stack:
    """One stack of transformer layers. name: "decoder" (also of a model with one stack) or "encoder"."""

    name: str
    module: nn.Module
    layers: nn.ModuleList


@dataclass(frozen=True)
class Architecture:
    """A model with a head, as the strategies see it.

    head_model: the transformers model under any PEFT wrapper. base: its body, without the head. output_head: the plain
    linear layer that makes logits, or None. position_rule: see tables.POSITION_RULES.
    """

    head_model: PreTrainedModel
    base: PreTrainedModel
    task: Task
    stacks: dict[str, Stack]
    output_head: nn.Linear | None
    position_rule: str
    position_modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.head_model).__name__

    @property
    def is_encoder_decoder(self) -> bool:
        return "encoder" in self.stacks

    @property
    def follows_encoder(self) -> bool:
        """Whether the body is a decoder alone, which is given the states of an encoder that ran before (T5)."""
        return self.task is Task.SEQ2SEQ_LM and not self.is_encoder_decoder

    @property
    def head(self) -> nn.Linear:
        """The output head of a model that has one."""
        assert self.output_head is not None, f"{self.name} has no plain linear head"
        return self.output_head

    @property
    def decoder(self) -> Stack:
        return self.stacks["decoder"]

    @property
    def shifts_labels(self) -> bool:
        """Whether the label of a token is what the token before it predicts."""
        return self.task is Task.CAUSAL_LM and not takes_shifted_labels(self.head_model)

    def configs(self) -> list:
        """Every distinct config object that a module of the model reads its attention implementation from."""
        found = {}
        for module in self.head_model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                found[id(config)] = config
        return list(found.values())


def describe(model: nn.Module) -> Architecture:
    """The architecture of `model`, a transformers model with a head, possibly inside a PEFT model.

    Raises UnsupportedModelError, which names the model, the reason and the remedy.
    """
    head_model = _without_adapters(model)
    task = _task(head_model)
    base, stacks = _body(head_model)
    if "encoder" in stacks and task is not Task.SEQ2SEQ_LM:
        raise UnsupportedModelError(
            f"{type(head_model).__name__}: of encoder-decoder models only sequence-to-sequence language models are supported, "
            f"got one for {task.value}. Use an encoder-only or a decoder-only model for this task."
        )
    head = _head(head_model, task)
    return Architecture(
        head_model=head_model,
        base=base,
        task=task,
        stacks=stacks,
        output_head=head if _own_class(head) is nn.Linear else None,
        position_rule=tables.POSITION_RULES.get(head_model.config.model_type, "row"),
        position_modules=_position_modules(stacks) if "encoder" in stacks or not _takes_positions(base) else {},
    )


def takes_shifted_labels(model: nn.Module) -> bool:
    """Whether the loss of a language model takes labels as they are, the i-th for what the i-th token predicts."""
    return any(kind.__name__ in tables.UNSHIFTED for kind in type(model).__mro__)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) gathers parameters of `model` from several processes whenever it runs."""
    return any(map(_is_unit, model.modules()))


def _is_unit(module: nn.Module | None) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not loaded it has not used it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _own_class(module: nn.Module | None) -> type:
    """The class of a module before FSDP2 has put one of its own, derived from it, in its place."""
    return type(module).__bases__[-1] if _is_unit(module) else type(module)


def _without_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, of a kind that may be given parts of a row."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} with a prompt-learning adapter (prompt, prefix or p-tuning): its virtual tokens shift every "
            "position. Use LoRA or another adapter inside the layers."
        )
    for name, adapter in getattr(model, "peft_config", {}).items():
        _refuse_adapter(type(model).__name__, name, adapter)
    return unwrapped(model)


def _refuse_adapter(model: str, name: str, adapter) -> None:
    """Adapters that look at a whole row."""
    if getattr(adapter, "alora_invocation_tokens", None):
        raise UnsupportedModelError(
            f"{model}: adapter {name!r} is an activated LoRA, which counts its tokens from the end of the rows it is given; here it is "
            "given parts of rows. Use LoRA without alora_invocation_tokens."
        )


def _task(head_model: PreTrainedModel) -> Task:
    names = [cls.__name__ for cls in type(head_model).__mro__]
    for name in names:
        for task, mapping in _TASK_MAPPINGS:
            if name in mapping.values() and not (task is Task.CAUSAL_LM and head_model.config.is_encoder_decoder):
                decodes_alone = task is Task.SEQ2SEQ_LM and not head_model.config.is_encoder_decoder  # of sounds: they are embeddings
                return Task.CAUSAL_LM if decodes_alone else task
    raise UnsupportedModelError(
        f"{names[0]} has no head this library knows. Expected a model for one of: {', '.join(t.value for t in Task)} "
        "(for example AutoModelForCausalLM)."
    )


def _body(head_model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Stack]]:
    """The module that runs the layers, and the layers: found by type, since every layer that can be checkpointed is one."""
    base = _base(head_model)
    lists = [(name, module) for name, module in base.named_modules() if _is_stack(module)] or _alike(head_model, base)
    if head_model.config.is_encoder_decoder and len(lists) == 2:
        (first, encoder_layers), (second, decoder_layers) = sorted(lists, key=lambda pair: "decoder" in pair[0])
        if "encoder" in first and "decoder" in second:
            encoder, decoder = (base.get_submodule(name.rpartition(".")[0]) for name in (first, second))
            return base, {
                "encoder": Stack("encoder", encoder, encoder_layers),
                "decoder": Stack("decoder", decoder, decoder_layers),
            }
    if len(lists) > 1:
        lists = _of_text(head_model, base, lists)
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise UnsupportedModelError(
            f"{type(head_model).__name__}: expected one stack of transformer layers (or one encoder and one decoder), found "
            f"{found}. {tables.NO_ATTENTION_REMEDY if not lists else f'Through which of them a token goes, and how often, is not known. {tables.REMEDY}'}"
        )
    ((name, layers),) = lists
    body = _model_around(base, name)  # some heads (OPT's) call it past the outer one
    return body, {"decoder": Stack("decoder", body, layers)}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_is_layer, module))


def _alike(head_model: PreTrainedModel, base: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """Of older models, whose layers cannot be checkpointed: a list of as many modules of one class as the config has layers."""
    count = getattr(head_model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return [(name, module) for name, module in lists if len(set(map(type, module))) == 1 and list(module[0].children())]


def _of_text(head_model: PreTrainedModel, base: PreTrainedModel, lists: list) -> list[tuple[str, nn.ModuleList]]:
    """The stacks of the part that is configured for text, where there are towers for images or sounds beside it."""
    text = head_model.config.get_text_config()
    return [(name, module) for name, module in lists if _model_around(base, name).config is text] or lists


def _model_around(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model around a module of `base`."""
    while name and not isinstance(base.get_submodule(name), PreTrainedModel):
        name = name.rpartition(".")[0]
    return base.get_submodule(name)


def _is_layer(module: nn.Module) -> bool:
    """Also inside of torch's wrappers for activation checkpointing, which accelerate uses under FSDP."""
    while tables.CHECKPOINTED in module._modules:
        module = module._modules[tables.CHECKPOINTED]
    return isinstance(module, GradientCheckpointingLayer)


def _base(head_model: PreTrainedModel) -> PreTrainedModel:
    base = head_model.base_model
    if base is head_model:  # its prefix names a part it does not have, as in Llama 4's text model; or its encoder has run before (T5)
        base = getattr(head_model, "model", None) or getattr(head_model, "decoder", None) or getattr(head_model, "text_decoder", None)
        base = base.base_model if isinstance(base, PreTrainedModel) else base
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(head_model).__name__} holds its layers and its head in one module, not in a body that can run on a part of the "
            f"tokens. {tables.REMEDY}"
        )
    return base


def _head(head_model: PreTrainedModel, task: Task) -> nn.Module | None:
    """What makes logits of every token."""
    if task is Task.TOKEN_CLASSIFICATION:
        return next((getattr(head_model, name) for name in tables.CLASSIFIER_NAMES if hasattr(head_model, name)), None)
    return head_model.get_output_embeddings() if task.loss_per_token else None


def _takes_positions(base: PreTrainedModel) -> bool:
    """Whether a body can be told the positions of its tokens; the decoders of BART and its kin cannot, as causal models either."""
    return "position_ids" in inspect.signature(type(base).forward).parameters


def _position_modules(stacks: dict[str, Stack]) -> dict[str, nn.Module]:
    return {
        stack.name: module
        for stack in stacks.values()
        for name, module in stack.module.named_children()
        if name in tables.POSITION_MODULE_NAMES
    }
