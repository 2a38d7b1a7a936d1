"""The arguments of a model's body for a pass over some of its tokens.

Shape legend: B rows of a batch, T tokens in a row (padding included).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutput

from hf_memtune._compat import is_fake
from hf_memtune.architectures import Architecture
from hf_memtune.architectures.positions import check_rope, token_positions
from hf_memtune.core.selection import Selection
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.model_pass import ModelPass
from hf_memtune.methods.attention.ready import may_begin, require_visibility, visible
from hf_memtune.methods.attention.spans import Chunks, Rows, Span
from hf_memtune.methods.attention.states import ARGUMENTS, CacheTemplate


class BodyCall:
    """One call of the model's body, taken apart so that it can be repeated for chosen tokens.

    inputs: the tensors among its arguments that require grad. leaves: what stands for them whenever the body runs, on whose `.grad`
    their gradients are summed. encoder_output, encoded: the former and the latter of an encoder that has run. returns_tuple: whether the caller wants a tuple in place of an output with names.
    given: the arguments as they came. accepted: names of those that the body knows. packs: whether its masks tell sequences apart by positions.
    """

    def __init__(self, architecture: Architecture, forward: Callable, args: tuple, kwargs: dict[str, Any], packs: bool = True):
        self.architecture, self.forward, self.packs = architecture, forward, packs
        signature = inspect.signature(type(architecture.base).forward)
        self.accepted = set(signature.parameters)
        bound = signature.bind(architecture.base, *args, **kwargs)
        variadic = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        self.arguments = {k: v for k, v in list(bound.arguments.items())[1:] if k not in variadic and v is not None}
        for name in variadic:
            self.arguments |= {k: v for k, v in bound.arguments.get(name, {}).items() if v is not None}
        self.returns_tuple = not self.arguments.pop("return_dict", getattr(architecture.base.config, "return_dict", True))
        self.inputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.given = dict(self.arguments)
        self.arguments = {name: self._detached(value) for name, value in self.arguments.items()}
        self.encoded: Tensor | None = None
        self.encoder_output: Tensor | None = None
        if (given := self.arguments.pop("encoder_outputs", None)) is not None:
            self.give_encoded(given[0])
        positions = self.arguments.get("position_ids")
        if positions is not None and positions.dim() == 1:
            self.arguments["position_ids"] = self.given["position_ids"] = positions[None]
        self.accepts_positions = "position_ids" in signature.parameters
        self._check()
        self.ready = _ready_masks(self.arguments.get("attention_mask"))
        self._masks = ("attention_mask", "decoder_attention_mask")
        self.rows = {name: self._rows(name) for name in architecture.stacks}
        if (states := self.arguments.get("encoder_hidden_states")) is not None:
            mask = self.arguments.get("encoder_attention_mask")
            positions = torch.arange(states.shape[1], device=states.device)[None]
            self.rows["encoder"] = Rows(states.shape[0], states.shape[1], _padding(mask), positions, None)

    def give_encoded(self, encoded: Tensor) -> None:
        """The output of the encoder (B, T, D), which then does not run."""
        self.encoder_output, self.encoded = encoded, self._detached(encoded)

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        self.inputs.append(value)
        self.leaves.append(value.detach().requires_grad_())
        return self.leaves[-1]

    def _check(self) -> None:
        for name in ARGUMENTS:
            cache = self.arguments.pop(name, None)
            if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
                raise MemTuneError(f"training steps take whole rows: {name} must not be given to them.")
        kernel = self.architecture.base.config._attn_implementation
        if isinstance(self.arguments.get("attention_mask"), dict) and kernel not in ("sdpa", "eager"):
            raise MemTuneError(
                f"attn_implementation: got {kernel!r} on a model that makes masks outside of its body, for that kernel alone; a pass over a part of "
                "the tokens cannot read them. Load the model with attn_implementation='sdpa'."
            )
        if self.arguments.get("cu_seq_lens_q") is not None and self.arguments.get("position_ids") is None:
            raise MemTuneError(
                "packed rows are told apart by position_ids that restart, got cu_seq_lens_q alone. Put position_ids into the batch."
            )
        is_causal, usual = self.arguments.get("is_causal"), getattr(self.architecture.base.config, "is_causal", True)
        if is_causal is not None and bool(is_causal) != bool(usual):
            raise MemTuneError(
                f"is_causal: got {is_causal} in a call of {self.architecture.name}, whose attention was looked at with {usual} before training. "
                "Leave it out, or set it in the model's config before the method (or the trainer) is made."
            )
        for name in ("output_attentions", "output_hidden_states"):
            if self.arguments.get(name, getattr(self.architecture.base.config, name, False)):
                raise MemTuneError(
                    f"{name}=True asks for values of every token, which a pass over a part of them does not have. Turn it off "
                    "in the batch and in the model's config for training."
                )

    def _rows(self, stack: str) -> Rows:
        prefix = "decoder_" if self.architecture.is_encoder_decoder and stack == "decoder" else ""
        ids, embeds = self.arguments.get(f"{prefix}input_ids"), self.arguments.get(f"{prefix}inputs_embeds")
        like = ids if ids is not None else embeds
        like = self.encoded if like is None and stack == "encoder" else like
        if like is None:
            raise MemTuneError(f"the batch has neither {prefix}input_ids nor {prefix}inputs_embeds.")
        if not like.shape[0]:
            raise MemTuneError(f"the batch has no rows: {prefix}input_ids is {tuple(like.shape)}. Leave out empty batches.")
        if not like.shape[1]:
            raise MemTuneError(f"row 0 of the batch has no tokens: {prefix}input_ids is {tuple(like.shape)}. Leave out empty rows.")
        is_ready = bool(self.ready) and not prefix
        mask = _real_tokens(self.ready) if is_ready else self.arguments.get(f"{prefix}attention_mask")
        if mask is not None and mask.dim() != 2:
            raise MemTuneError(
                f"{prefix}attention_mask has {mask.dim()} dimensions, expected 2 (batch, tokens), or 4 (batch, 1, tokens, tokens). For packed "
                "rows pass position_ids that restart and no mask."
            )
        if mask is not None and mask.shape[0] == 1:
            mask = mask.expand(like.shape[0], -1)
        if mask is not None and mask.shape != like.shape[:2]:
            raise MemTuneError(
                f"{prefix}attention_mask is {tuple(mask.shape)}, expected {tuple(like.shape[:2])}, the shape of the {stack}'s tokens."
            )
        given = self.arguments.get("position_ids") if not prefix else None
        if given is not None and (given.shape[-1] != like.shape[1] or given.shape[-2] not in (1, like.shape[0])):
            raise MemTuneError(
                f"position_ids are {tuple(given.shape)}, expected {tuple(like.shape[:2])}, or one row for all: one position a token."
            )
        if given is not None and given.dim() == 3:  # of several axes, of which a fourth one, the first, is that of the text
            given = given[0] if given.shape[0] == 4 else None
        positions = given if given is not None else token_positions(self.architecture, ids, mask, like)
        check_rope(self.architecture, like.shape[1])
        padding, segments = _padding(mask), None
        # OPT makes a mask of ones, where it is given none
        if given is not None and not is_ready and self.architecture.position_rule != "attention_mask":
            segments = self._segments(given, mask, padding, like.shape[0])
        return Rows(like.shape[0], like.shape[1], padding, positions, segments)

    def _segments(self, positions: Tensor, mask: Tensor | None, padding: Tensor | None, rows: int) -> Tensor | None:
        """(B, T) int64: the sequences that attention tells apart in packed rows; None: each row is one."""
        base = self.architecture.base
        if "flash" in (base.config._attn_implementation or ""):  # None: a model without the interface
            return flash_segments(positions, self.arguments) if rows == 1 and padding is None else None
        makes_a_cache = self.arguments.get("use_cache", getattr(base.config, "use_cache", False))
        packs = not makes_a_cache or (getattr(base, "gradient_checkpointing", False) and base.training)
        if mask is not None or not packs:  # only where there is no mask, not even of ones, do positions pack
            return None
        found = find_packed_sequence_indices(positions.expand(rows, -1))
        if not self.packs and found is not None and not is_fake(found) and bool(found.any()):
            raise MemTuneError(
                f"position_ids: got several sequences in a row, but the masks of {self.architecture.name} do not tell them apart (its body hands no "
                "positions to what makes them), so that they would see one another, as they do in plain training. Leave packing out, or load the "
                "model with flash attention."
            )
        return found

    def input_ids(self, stack: str) -> Tensor | None:
        """(B, T) int64 of a stack, or None where it was given embeddings."""
        prefix = "decoder_" if self.architecture.is_encoder_decoder and stack == "decoder" else ""
        return self.arguments.get(f"{prefix}input_ids")

    @property
    def decoder(self) -> Rows:
        """The rows whose tokens have outputs."""
        return self.rows["decoder"]

    def spans(self, decoder: Span | None = None) -> dict[str, Span]:
        """By stack, whole rows; of the decoder's, the tokens of the span that is given."""
        whole = {name: rows.whole() for name, rows in self.rows.items()}
        return whole if decoder is None else whole | {"decoder": decoder}

    def spans_of(self, chosen: dict[str, Selection]) -> dict[str, Span]:
        """By stack, the tokens that are chosen; whole rows where none are."""
        return {name: rows.kept(chosen[name]) if name in chosen else rows.whole() for name, rows in self.rows.items()}

    def encoder_arguments(self) -> dict[str, Any]:
        """The arguments of an encoder-decoder model's body that are its encoder's."""
        return {k: v for k, v in self.given.items() if k in ("input_ids", "attention_mask", "inputs_embeds")}

    def chunks(self, size: int, template: CacheTemplate | None) -> Chunks:
        """Chunks of `size` tokens, or of more where no token before one may look beyond it, as ready-made masks tell.

        template: of the body's cache, where layers hand something on. Raises MemTuneError for rows that are packed by their lengths, of
        layers that hand states on: these read the lengths of whole rows.
        """
        if template is not None and template.has_states and self.arguments.get("cu_seq_lens_q") is not None:
            raise MemTuneError(
                f"cu_seq_lens_q: {self.architecture.name} has layers that hand a state on from token to token, which the lengths of whole rows "
                "tell where to begin anew, and not in a part of their tokens. Train without packing, or with activation checkpointing instead "
                "(--activation_checkpointing)."
            )
        masks = [mask for mask in self.ready.values() if mask is not None]
        anywhere = torch.stack([may_begin(mask) for mask in masks]).all(0) if masks else None
        return Chunks.of(self.decoder.length, size, template is not None, anywhere)

    def at(self, spans: dict[str, Span], running: ModelPass, live: bool = False, cache: Cache | None = None) -> dict[str, Any]:
        """The arguments for these tokens in the pass that runs: ids, embeddings and positions taken, attention masks whole.

        Of ready-made masks the part of these tokens is taken. live: connected to the caller's own tensors, where they require grad, and not to leaves in their place. cache: with the states of
        layers at the first of the tokens; masks then end with the last one, for such layers read them from their end.
        """
        encoded = self.encoder_output if live else self.encoded
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if encoded is not None:
            arguments["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        if cache is not None:
            arguments[next(name for name in ARGUMENTS if name in self.accepted)] = cache
        for name, value in self.arguments.items():
            value = self.given[name] if live else value
            if name == "use_cache" or name in self._masks:
                continue
            if name.startswith("encoder_"):  # of an encoder that ran before the body
                arguments[name] = value
                continue
            span = spans["encoder" if self.architecture.is_encoder_decoder and not name.startswith("decoder_") else "decoder"]
            arguments[name] = span.take(value) if _is_per_token(value, span.rows) else value
        for stack, span in spans.items():
            if stack not in self.architecture.stacks:
                continue
            prefix = "decoder_" if self.architecture.is_encoder_decoder and stack == "decoder" else ""
            mask = self._whole_mask(f"{prefix}attention_mask", span.rows)
            arguments[f"{prefix}attention_mask"] = mask if cache is None else mask[:, : span.visible]
        if self.ready:
            parts = {name: running.ready_mask(mask) for name, mask in self.ready.items()}
            arguments["attention_mask"] = parts if isinstance(self.arguments["attention_mask"], dict) else parts[""]
        if self.accepts_positions:
            positions, span = self.arguments.get("position_ids"), spans["decoder"]
            if positions is not None and positions.dim() == 3:
                arguments["position_ids"] = torch.stack([span.take(axis) for axis in positions])
            else:
                taken = span.take(span.rows.positions)
                # layers that choose their keys look for the positions of each row
                arguments["position_ids"] = taken if cache is None else taken.expand(span.rows.batch, -1)
        return arguments

    def _whole_mask(self, name: str, rows: Rows) -> Tensor:
        # always given: without one transformers would look for packed rows in the positions of the kept tokens
        given = self.arguments.get(name)
        return given if given is not None else rows.positions.new_ones(rows.batch, rows.length)


def _ready_masks(given: Any) -> dict[str, Tensor | None]:
    """Masks that were made outside of the body, (B or 1, 1, T, T), by the kind of layer that they are for; "" for all. None: causal."""
    found = given if isinstance(given, dict) else {"": given} if isinstance(given, Tensor) and given.dim() == 4 else {}
    for name, mask in found.items():
        if mask is not None:
            require_visibility(mask, f"attention_mask[{name!r}]" if name else "attention_mask")
    return found


def _real_tokens(ready: dict[str, Tensor | None]) -> Tensor | None:
    """(B or 1, T) bool: the tokens that see themselves, in any of the masks; None: all."""
    seen = [visible(mask).diagonal(dim1=2, dim2=3)[:, 0] for mask in ready.values() if mask is not None]
    return torch.stack(torch.broadcast_tensors(*seen)).any(0) if seen and len(seen) == len(ready) else None


def _is_per_token(value: Any, rows: Rows) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] in (1, rows.batch) and value.shape[1] == rows.length


def flash_segments(positions: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """(1, T) int64: the sequences of one row for transformers' flash attention; None: one.

    By the lengths where all that belongs to them is given, else by positions: they begin anew at the lowest one, wherever the others jump.
    """
    if all(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")):
        indices, inner = torch.arange(positions.shape[-1], device=positions.device), arguments["cu_seq_lens_q"][1:-1]
        return torch.searchsorted(inner.to(indices.dtype), indices, right=True)[None] if inner.numel() else None
    begins = positions == positions.min()
    # tokens before the first that begins one, where a row was cut in the middle of a sequence, are one by themselves
    return begins.long().cumsum(-1) if is_fake(positions) or bool(begins[:, 1:].any()) else None


def _padding(mask: Tensor | None) -> Tensor | None:
    """(B, T) bool, or None where every token is real. Traced masks have no values: they say themselves whether they stand for padding."""
    if mask is None or (is_fake(mask) and not getattr(mask, "stands_for_padding", False)):
        return None
    if is_fake(mask):
        return mask.bool()
    mask = mask.bool()
    return None if bool(mask.all()) else mask
