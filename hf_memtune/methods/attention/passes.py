"""The passes of a step through a model's attention: context (store keys and values), focus (kept tokens), stream (chunks).

Shape legend: B rows, H query heads, K key heads, T tokens in a row, S tokens of the pass, C channels of a head.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_memtune._compat import is_fake
from hf_memtune.core.attention_kernels import Attended
from hf_memtune.core.kept_attention import KeptAttention
from hf_memtune.core.owed import Live, OwedGradients
from hf_memtune.core.pieces import Prefix, attend, attend_with_gradient
from hf_memtune.core.store import place
from hf_memtune.errors import MemTuneError
from hf_memtune.methods.attention.model_pass import KernelFacts, ModelPass
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.spans import Span, attention_mask

_ELSEWHERE = (
    "position_bias",
    "softcap",
    "s_aux",
    "cache",
    "indices",
)  # of the attention interface: what only the model's own attention knows


def _as_computed(query: Tensor) -> Tensor:
    """In the dtype that attention computes in under autocast, as `scaled_dot_product_attention` is."""
    kind = query.device.type
    return query.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and query.dtype != torch.float64 else query


def _returned(output: Tensor) -> tuple[Tensor, None]:
    """(B, H, S, C) as the attention interface returns it: (B, S, H, C), in that order in memory too."""
    return output.transpose(1, 2).contiguous(), None


class ChunkPass(ModelPass):
    """All tokens of a chunk of every row. No mask is made where the kernel needs none, or the keys are taken in pieces."""

    def __init__(self, spans, store, places, kernel: KernelFacts):
        super().__init__(spans, store, places)
        self.kernel = kernel

    def give(self, asked, queries, keys, may_skip):
        rule = asked.rule
        if queries is keys and rule not in (causal_mask_function, bidirectional_mask_function):
            self._require_nothing_beyond(rule, queries)
        is_own = queries is keys and self.stack == "decoder"
        if self.takes_pieces and is_own:
            return asked.stand_in()
        if may_skip and queries.rows.real is None and keys.rows.real is None and queries.rows.segments is None:
            from_the_first = queries.start == 0 and queries.index.shape[1] == keys.visible
            if rule is bidirectional_mask_function or (rule is causal_mask_function and from_the_first and self.kernel.knows_causal):
                return None
        if self.stands_in and is_own:
            return asked.stand_in()
        asked.given = asked.whole
        return asked.given

    def keep(self, module: nn.Module, key: Tensor, value: Tensor, start: int, length: int) -> None:
        """Store keys and values of a chunk, from token `start` on of `length`: where sdpa computes attention in the dtype to which it would cast
        them. Under autocast rotary embeddings leave keys in float32, of which it reads half of the bytes."""
        if self.kernel.in_pieces:
            key, value = _as_computed(key), _as_computed(value)
        self.store.write(id(module), key, value, start, length)

    @property
    def takes_pieces(self) -> bool:
        """Whether attention of the decoder to itself goes piece by piece in this pass."""
        return self.kernel.in_pieces and self.stands_in

    @property
    def stands_in(self) -> bool:
        """Whether layers of the decoder are given stand-ins in this pass: of all masks together only one is then there at a time."""
        return self.kernel.stands_in

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, attention: Callable, kwargs: dict):
        raise NotImplementedError

    def prefix_of(self, module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: dict, owed=None, tokens=None) -> Prefix | None:
        """What a call of the attention is to go through piece by piece; None where it is to go the model's own way."""
        asked = self.asked(mask, "decoder")
        if asked is None or not asked.stands_in or not self.takes_pieces:
            return None
        if kwargs.get("dropout") or any(kwargs.get(name) is not None for name in _ELSEWHERE):
            return None
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return Prefix(self.store, id(module), asked.pieces, scale, owed, tokens)

    def made(self, module: nn.Module, mask: Tensor | None) -> Tensor | None:
        """The mask that a layer was given, made in full where it was given a stand-in."""
        asked = self.asked(mask, "decoder")
        if asked is not None and asked.stands_in:
            return asked.whole
        if asked is None and mask is not None and any(other.stands_in for other in self._asked):
            raise MemTuneError(
                f"{type(module).__name__} was given a mask, and hands on another one that it made of it, which it did not do before the first step. "
                "Train it with activation checkpointing instead (activation_checkpointing=True)."
            )
        return mask

    def _require_nothing_beyond(self, mask_function: Callable, span: Span) -> None:
        """Where tokens of a block see one another both ways, a chunk that ends inside of it would miss some."""
        beyond = span.visible
        if beyond >= span.rows.length or is_fake(span.index):
            return
        device = span.index.device
        batch, last = torch.arange(span.rows.batch, device=device)[:, None, None, None], torch.full((1, 1, 1, 1), beyond - 1, device=device)
        if bool(mask_function(batch, torch.zeros_like(last), last, last + 1).any()):
            raise MemTuneError(
                f"token {beyond - 1} of a row attends to the token after it, with which the next chunk begins: tokens of a block see one another "
                "both ways. Set sequence_chunk_size so that no block is cut, or leave it out and use activation checkpointing."
            )


class ContextPass(ChunkPass):
    """All tokens, without gradient, in chunks: stores every layer's keys and values, and what the scores will need.

    kept_attention: what keeps the attention of the decoder to itself, where it goes in pieces; None: nothing does.
    """

    def __init__(self, spans, store, places, records: Records, kernel: KernelFacts, kept_attention: KeptAttention | None = None):
        super().__init__(spans, store, places, kernel)
        self.records, self.kept_attention = records, kept_attention
        self._seen: set[int] = set()  # modules whose attention was kept
        self._encodes = False  # whether the encoder runs in this pass, and not before it

    def attend(self, module, query, key, value, mask, attention, kwargs):
        of = self.places.key_stack(module)
        keys = self.spans[of]
        self._encodes |= self.stack == "encoder"
        if of == "encoder" and not self._encodes:  # all tokens of which are there in every pass
            self.records.attention_call(self, module, query, mask, kwargs)
            return attention(module, query, key, value, mask, **kwargs)
        self.keep(module, key, value, keys.first, keys.rows.length)
        self.records.attention_call(self, module, query, mask, kwargs)
        if of == "decoder":
            if (prefix := self.prefix_of(module, query, mask, kwargs)) is not None:
                found = attend(_as_computed(query), prefix)
                self._keep(module, found)
                return _returned(found.output)
            if self.kept_attention is not None:
                self.kept_attention.left_out.add(id(module))
            mask = self.made(module, mask)
        key, value = self.store.prefix(id(module), keys.visible)
        return attention(module, query, key, value, mask, **kwargs)

    def _keep(self, module: nn.Module, found: Attended) -> None:
        if self.kept_attention is None:
            return
        if id(module) in self._seen:
            raise MemTuneError(
                f"{type(module).__name__} attends twice in one pass, so that one attention would be taken for the other. Leave "
                "keep_attention_outputs out."
            )
        self._seen.add(id(module))
        span = self.spans["decoder"]
        self.kept_attention.put(id(module), found, span.first, span.rows.length)

    def extended(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of a layer of the decoder with hand-written attention: the keys and values of all tokens up to the chunk's end."""
        keys = self.spans["decoder"]
        if key.shape[2] != keys.index.shape[1]:
            raise MemTuneError(
                f"layer {number} makes {key.shape[2]} keys of {keys.index.shape[1]} tokens: something is put before the tokens that it is given."
            )
        self.store.write(_by_hand(number), key, value, keys.first, keys.rows.length)
        return self.store.prefix(_by_hand(number), keys.visible)

    def indexed(self, number: int, keys: Tensor) -> Tensor:
        """Keys (B, S, C) by which a layer chooses what to attend to, of all tokens up to the chunk's end: no gradient goes through them."""
        span = self.spans["decoder"]
        self.store.write(_of_index(number), keys[:, None], keys[:, None, :, :0], span.first, span.rows.length)
        return self.store.prefix(_of_index(number), span.visible)[0][:, 0]


class Made(Exception):
    """The keys and values that were wanted are stored."""


class KeysPass(ContextPass):
    """Of a layer that was given its masks in the pass `of`: stores the keys and values of its attention modules, by their ids `wanted`.

    Raises Made when the last of them has its keys: what a layer does from then on is not run.
    """

    def __init__(self, of: ChunkPass, wanted: set[int]):
        super().__init__(of.spans, of.store, of.places, Records({}, wanted=False), of.kernel)
        self.stack, self._asked, self._left = of.stack, of._asked, set(wanted)

    def attend(self, module, query, key, value, mask, attention, kwargs):
        self._left.discard(id(module))
        if self._left:
            return super().attend(module, query, key, value, mask, attention, kwargs)
        keys = self.spans["decoder"]
        self.keep(module, key, value, keys.first, keys.rows.length)
        raise Made


def _by_hand(number: int) -> int:
    """By what the store knows the keys and values of a layer with hand-written attention; those of modules are positive."""
    return -1 - 2 * number


def _of_index(number: int) -> int:
    return -2 - 2 * number


class FocusPass(ModelPass):
    """The selected tokens, with gradient: their live keys and values take their places among the stored ones."""

    def attend(self, module, query, key, value, mask, attention, kwargs):
        span = self.spans[self.places.key_stack(module)]
        if span.selection is None:  # the states of an encoder that ran before the body, all of them
            return attention(module, query, key, value, mask, **kwargs)
        stored = self.store.prefix(id(module), span.rows.length)

        def among(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(stored, (key, value))
            return tuple(place(whole.to(live.dtype), live, span.index, span.valid) for whole, live in pairs)

        return _computed_again(module, attention, kwargs, mask, among, query, key, value), None


def _computed_again(module: nn.Module, attention: Callable, kwargs: dict, mask, among: Callable, query, key, value) -> Tensor:
    """Attention to live keys and values among stored ones, computed again in backward: or autograd would save what each layer attends to."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(module, query, *among(key, value), mask, **kwargs)[0]

    if not torch.is_grad_enabled():
        return run(query, key, value)
    random = bool(kwargs.get("dropout"))
    return checkpoint(run, query, key, value, use_reentrant=False, preserve_rng_state=random, determinism_check="none")


class WholePass(ChunkPass):
    """All tokens at once, through a kernel that a pass can use, storing nothing."""

    stands_in = False

    def attend(self, module, query, key, value, mask, attention, kwargs):
        return attention(module, query, key, value, mask, **kwargs)


class StreamPass(ChunkPass):
    """One chunk of every row, or some tokens of it, with gradient, among the stored keys and values of the tokens before.

    Nothing of the stored is copied or saved: see `core.pieces`, and `core.owed.Streamed`. stores: whether this chunk's keys and values are not stored
    yet, because no context pass came by. alone: whether it is all of the row, so that no other chunk will ask for them. Attention to and
    inside a bidirectional encoder is the model's own. blind: (B, S) bool, the tokens of padding that see no token, if eager attention
    without sinks has run, which lets them see all of the row, so another one in every pass; else None. kept_attention: what of its attention was
    kept, and is not computed again.
    """

    def __init__(
        self, spans, store, places, kernel: KernelFacts, owed: OwedGradients, stores: bool = False, alone: bool = False,
        kept_attention: KeptAttention | None = None,
    ):  # fmt: skip
        super().__init__(spans, store, places, kernel)
        self.kept_attention = kept_attention
        span = spans["decoder"]
        index = None if span.selection is None else span.index
        self.owed, self.stores, self.alone, self.live = owed, stores, alone, Live(span.begins, span.visible, index, span.valid)
        self.blind: Tensor | None = None
        self._unseeing: Tensor | None = None

    @property
    def stands_in(self):
        return self.kernel.stands_in and not self.alone

    def give(self, asked, queries, keys, may_skip):
        given = super().give(asked, queries, keys, may_skip)
        if keys is queries and keys.rows.real is not None and not self.alone and not self.kernel.knows_causal:
            unseeing = ~attention_mask(asked.rule, queries, keys).any(-1)[:, 0]
            self._unseeing = unseeing if self._unseeing is None else self._unseeing | unseeing
        return given

    def attend(self, module, query, key, value, mask, attention, kwargs):
        if self.alone or self.places.key_stack(module) == "encoder":
            return attention(module, query, key, value, mask, **kwargs)
        if self.stores:
            self.keep(module, key, value, self.live.start, self.live.stop)
        if (prefix := self.prefix_of(module, query, mask, kwargs, self.owed, self.live)) is not None:
            return _returned(attend_with_gradient(_as_computed(query), key, value, prefix, self._known(module)))
        if kwargs.get("s_aux") is None:
            self.blind = self._unseeing
        among = partial(self._among, id(module))
        return _computed_again(module, attention, kwargs, self.made(module, mask), among, query, key, value), None

    def _known(self, module: nn.Module) -> Attended | None:
        if self.kept_attention is None or self.live.index is not None:
            return None
        return self.kept_attention.get(id(module), self.live.start, self.live.stop - self.live.start)

    def _among(self, of: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stored = self.store.prefix(of, self.live.stop)
        # in the dtypes of the live ones, in which the model would sum their gradients over the queries that share them
        return self.owed.attach(of, (key, value), (stored[0].to(key.dtype), stored[1].to(value.dtype)), self.live)

    def extended(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of a layer with hand-written attention: the keys and values of all tokens up to the chunk's end, connected to the chunk's own."""
        if self.alone:
            return key, value
        self.blind = self._unseeing
        return self.owed.attach(_by_hand(number), (key, value), self._stored(_by_hand(number), key, value), self.live)

    def indexed(self, number: int, keys: Tensor) -> Tensor:
        """As in a context pass."""
        return keys if self.alone else self._stored(_of_index(number), keys[:, None], keys[:, None, :, :0])[0][:, 0]

    def _stored(self, of: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.stores:
            self.store.write(of, key, value, self.live.start, self.live.stop)
        return self.store.prefix(of, self.live.stop)
