"""What a model's body returns for a part of its tokens, and what it would have returned for all of them.

Shape legend: B rows of a batch, T tokens in a row, S tokens of a part, D hidden size, E whatever else a token has (experts, say).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.architectures import tables
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.attention.states import ARGUMENTS


class BodyOutputs:
    """The outputs of all tokens, put together from those of parts.

    Of an output with names, every floating tensor that has an entry for each token: the last hidden states (B, S, D), and router logits
    of layers, (B * S, E) or (B, S, E) each. Their order is `tensors_of`, the last hidden states first. What is pooled of a row is made of
    the hidden states of all tokens, by the `pooler` of the body.
    encoded: the output of an encoder (B, T, D) that ran with a part, and not before.
    """

    def __init__(self, call: BodyCall):
        self.batch, self.length = call.decoder.batch, call.decoder.length
        self._base = call.architecture.base
        self.tensors: list[Tensor] = []
        self.encoded: Tensor | None = None
        self._encodes = call.architecture.is_encoder_decoder and call.encoded is None
        self._flat: list[bool] = []  # whether rows and tokens are one dimension
        self._like: Any = None

    @torch.no_grad()
    def put(self, output: Any, span: Span) -> None:
        """Keep the outputs of a contiguous part."""
        parts = list(self.tensors_of(output))
        if self._encodes:
            self.encoded = output.encoder_last_hidden_state.detach()
        if self._like is None:
            self._like = _without_tensors(output)
            self._flat = [part.shape[:2] != (self.batch, span.index.shape[1]) for part in parts]
            shapes = [self._by_row(part, number).shape for number, part in enumerate(parts)]
            self.tensors = [part.new_empty(self.batch, self.length, *shape[2:]) for part, shape in zip(parts, shapes)]
        for number, (whole, part) in enumerate(zip(self.tensors, parts, strict=True)):
            whole.narrow(1, span.first, span.index.shape[1]).copy_(self._by_row(part.detach(), number))

    def tensors_of(self, output: Any) -> Iterator[Tensor]:
        """The tensors of an output that have an entry for each token."""
        yield output.last_hidden_state
        for name, value in output.items():
            if not _is_of_tokens(name):
                continue
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if not isinstance(part, Tensor) or not part.dim() or part.shape[0] % self.batch:
                    raise MemTuneError(
                        f"the model's body returns {name}, which has not one entry for each token, so that it cannot be put together from "
                        "parts of the rows. Turn it off in the batch and in the model's config for training."
                    )
                yield part

    def take(self) -> list[Tensor]:
        """The tensors, in the shapes in which the body returns them, held here no longer."""
        taken, self.tensors = self.tensors, []
        return self.as_returned(taken)

    def as_returned(self, tensors: list[Tensor]) -> list[Tensor]:
        """Outputs (B, T, ...) in the shapes in which the body returns them."""
        return [whole.flatten(0, 1) if flat else whole for whole, flat in zip(tensors, self._flat)]

    def as_rows(self, tensors: list[Tensor]) -> list[Tensor]:
        """Outputs as the body returns them in the shape (B, T, ...)."""
        return [self._by_row(tensor, number) for number, tensor in enumerate(tensors)]

    def by_row(self, output: Any) -> list[Tensor]:
        """The tensors of the output of a part, (B, S, ...) each."""
        return self.as_rows(list(self.tensors_of(output)))

    def rebuilt(self, tensors: list[Tensor], encoded: Tensor | None = None) -> Any:
        """An output of the body's own type with these tensors. encoded: the output of the encoder, where there is one."""
        kind, shape = self._like
        given = iter(tensors)
        hidden = next(given)
        fields: dict[str, Any] = {"last_hidden_state": hidden}
        for name, count in shape.items():
            fields[name] = next(given) if count is None else tuple(next(given) for _ in range(count))
        fields |= pooled(self._base, kind, hidden)
        if encoded is not None:
            fields["encoder_last_hidden_state"] = encoded
        return kind(**fields)

    def roots(self, output: Any, cotangents: list[Tensor | None], span: Span) -> tuple[list[Tensor], list[Tensor]]:
        """Of a part that ran with gradient: the tensors to go backward from, and the gradient of each, (B, S, ...)."""
        tensors, gradients = [], []
        for number, (part, whole) in enumerate(zip(self.tensors_of(output), cotangents, strict=True)):
            if whole is not None and part.requires_grad:
                tensors.append(self._by_row(part, number))
                gradients.append(_masked(span.take(self._by_row(whole, number)), span).to(part.dtype))
        return tensors, gradients

    def _by_row(self, tensor: Tensor, number: int) -> Tensor:
        return tensor.unflatten(0, (self.batch, -1)) if self._flat[number] else tensor


def pooled(base: nn.Module, kind: Any, hidden_BTD: Tensor) -> dict[str, Tensor]:
    """What an output of class `kind` has of each row beside the hidden states of all its tokens, where the body makes it."""
    pooler = getattr(base, tables.POOLER_NAME, None)
    return {} if pooler is None or "pooler_output" not in kind.__dataclass_fields__ else {"pooler_output": pooler(hidden_BTD)}


def _masked(gradient: Tensor, span: Span) -> Tensor:
    """What fillers would send is nobody's."""
    if span.valid is None:
        return gradient
    return gradient.masked_fill(~span.valid.reshape(*span.valid.shape, *[1] * (gradient.dim() - 2)), 0)


def _is_of_tokens(name: str) -> bool:
    """Whether a further field of an output is expected to have an entry for each token."""
    return name not in ("last_hidden_state", "pooler_output", *ARGUMENTS) and not name.startswith("encoder_")


def _without_tensors(output: Any) -> tuple[type, dict[str, int | None]]:
    """The class of an output, and of each further field how many tensors it has, None for one that is no tuple."""
    own = {name: value for name, value in output.items() if _is_of_tokens(name)}
    return type(output), {name: len(value) if isinstance(value, (tuple, list)) else None for name, value in own.items()}
