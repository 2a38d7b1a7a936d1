"""What all passes through a model's attention share: where its modules stand, and the masks between tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_memtune.architectures import Architecture, tables
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention import ready
from hf_memtune.methods.attention.masks import Asked
from hf_memtune.methods.attention.spans import Span, additive


class Places:
    """Where in the model an attention module stands: in which stack, and whose keys it reads."""

    def __init__(self, architecture: Architecture):
        encoder = architecture.stacks["encoder"].module.modules() if architecture.is_encoder_decoder else ()
        self._encoder = {id(module) for module in encoder}
        self._cross = {
            id(module)
            for name, module in architecture.base.named_modules()
            if not set(tables.CROSS_ATTENTION_NAMES).isdisjoint(name.split("."))
        }

    def is_cross(self, module: nn.Module) -> bool:
        return id(module) in self._cross

    def key_stack(self, module: nn.Module) -> str:
        return self.stack_of_key(id(module))

    def stack_of_key(self, key: int) -> str:
        """Of which stack the keys and values are that a store has under this key."""
        return "encoder" if key in self._encoder or key in self._cross else "decoder"


@dataclass(frozen=True)
class KernelFacts:
    """knows_causal: whether the attention kernel applies a causal mask by itself where it is given none. in_pieces: whether attention to
    stored keys may go piece by piece (`core.pieces`) in its place. stands_in: whether layers may be given stand-ins for masks, which
    are made when attention comes to them."""

    knows_causal: bool
    in_pieces: bool
    stands_in: bool


class ModelPass:
    """What all passes share: which span queries and keys come from, and the mask between them."""

    def __init__(self, spans: dict[str, Span], store: KeyValueStore, places: "Places"):
        self.spans, self.store, self.places = spans, store, places
        self.stack = "decoder"  # whose mask is asked for; set by the router when a stack is entered
        self._asked: list[Asked] = []

    def mask(self, mask_function: Callable, finish: Callable[[Tensor], Tensor], may_skip: bool = True) -> Tensor | None:
        """The finished mask of a rule; None where the kernel needs none, if whoever asks `may_skip` it."""
        queries, keys = self.spans[self.stack], self.spans[self.stack]
        if self.stack == "decoder" and "encoder" in self.spans and mask_function is bidirectional_mask_function:
            keys = self.spans["encoder"].rows.whole()
        asked = Asked(self.stack, mask_function, queries, keys, finish)
        self._asked.append(asked)
        return self.give(asked, queries, keys, may_skip)

    def ready_mask(self, whole: Tensor | None) -> Tensor | None:
        """The part of a mask that was made of all tokens outside of the body, for the tokens of this pass; None stands for a causal one."""
        own = self.spans["decoder"]
        rule = causal_mask_function if whole is None else ready.rule_of(whole)
        finish: Callable[[Tensor], Tensor] = _as_it_is
        if whole is not None and whole.dtype != torch.bool:
            finish = partial(additive, dtype=whole.dtype, hidden=torch.finfo(whole.dtype).min)
        asked = Asked("decoder", rule, own, own, finish)
        self._asked.append(asked)
        return self.give(asked, own, own, may_skip=True)

    def give(self, asked: Asked, queries: Span, keys: Span, may_skip: bool) -> Tensor | None:
        """What the model gets: here, the mask."""
        asked.given = asked.whole
        return asked.given

    def forget_masks(self) -> None:
        """Let go of masks that were made for layers that were given a stand-in, in full or of squares."""
        for asked in self._asked:
            asked.forget()

    @property
    def has_rules(self) -> bool:
        """Whether any mask was asked for; else the model makes its own."""
        return bool(self._asked)

    def asked(self, mask: Tensor | None, stack: str) -> Asked | None:
        """What a stack asked for when it was given this mask."""
        return next((asked for asked in self._asked if asked.stack == stack and asked.is_given(mask)), None)

    def rule_of(self, mask: Tensor | None, stack: str) -> Callable:
        """The index-based rule that the mask of a stack's attention to itself was made from."""
        rules = [asked.rule for asked in self._asked if asked.stack == stack and asked.is_given(mask)]
        rules = rules or [asked.rule for asked in self._asked if asked.stack == stack]
        # None is made for attention to all of an encoder too, which decoders ask for even where they have none
        rules = [rule for rule in rules if rule is not bidirectional_mask_function] or rules
        if not rules:
            raise MemTuneError("an attention layer ran without asking for a mask first: its mask rule is unknown.")
        return rules[-1]


def _as_it_is(mask: Tensor) -> Tensor:
    return mask
