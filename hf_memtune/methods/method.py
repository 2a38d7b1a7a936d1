"""What all methods that change the backward pass of a model have in common: put on one model, and taken off again.

While a method is on, `model(**batch)` returns what it always returned; in training mode, with gradient enabled, its body goes another way
to the same outputs, and backward another way to the gradient. All else, evaluation and generation included, passes through untouched.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_memtune._compat import allow_4bit_repacking, forbid_4bit_repacking, has_repacked_4bit, is_in_function_transform
from hf_memtune.architectures import Architecture, describe, is_sharded
from hf_memtune.core.offload import HostMemory
from hf_memtune.errors import ConfigError, MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.events import Listeners
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.head import Head
from hf_memtune.methods.overrides import Override, runs_its_own
from hf_memtune.methods.verify import verify
from hf_memtune.methods.verify_training import buffers_kept, require_no_dropout_per_call, require_no_trace
from hf_memtune.settings.streaming import StreamingConfig

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=StreamingConfig)


class Method(Generic[Config]):
    """A method on one model, from when it is made until `remove()`; also a context manager.

    listeners: who is told of its calls. host: the memory for what is kept off the device. facts: what a probe of the model found.
    check: False leaves out what of the probe needs tensors with values. looks_only: changes no call of the model.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    why_gathered = "Here layers run several times."  # what is said of a model whose parameters are spread over processes
    sums_dtype: torch.dtype | None = None  # of what chunks owe to one another; None: as it comes
    scores_last_block: bool | None = None  # whether scores run the last block alone, which then must be able to; None: nothing scores

    def __init__(self, model: nn.Module, config: Config, check: bool = True, looks_only: bool = False):
        self.config, self.architecture, self.host = config, describe_as_it_runs(model), HostMemory()
        if not looks_only:
            _require_free(self.architecture)
        self.listeners = Listeners()
        self._given = model
        self.require_gathered()
        _require_plain_lookups(self.architecture)
        self.prepare()
        if has_repacked_4bit(model):
            raise UnsupportedModelError(
                f"{self.architecture.name}: its 4-bit weights were repacked by an evaluation on the CPU, and no gradient passes them any "
                "more. Load the model again, and make the trainer (or this object) before the first evaluation."
            )
        self._router: Router | None = Router(self.architecture)
        self._undo: list[Callable[[], None]] = []
        self._heads: list[Head] = []  # of the calls of the model that are open, the innermost last
        self._is_aside = self._has_noticed = False
        repacking = forbid_4bit_repacking(model)
        self._undo.append(partial(allow_4bit_repacking, repacking))
        try:
            with buffers_kept(self.architecture.base):
                self.facts: Facts = self.probe(check)
                self.require(self.facts)
            if check and not looks_only and not is_sharded(model):
                require_no_trace(self.architecture)
            if not looks_only:
                self._put_on()
        except BaseException:
            self.remove()
            raise

    # -- what kinds of method do

    def prepare(self) -> None:
        """What a method needs to know of the architecture before anything is touched."""

    def require_gathered(self) -> None:
        """Refuse a model whose parameters are spread over processes."""
        is_spread = any(hasattr(parameter, "full_tensor") for parameter in self.architecture.base.parameters())  # a DTensor
        if is_spread or is_sharded(self._given):
            raise UnsupportedModelError(
                f"{self.architecture.name}: its parameters are spread over processes (FSDP2 or tensor parallelism), which gather them for "
                f"one forward and one backward of each layer. {self.why_gathered} Launch with plain data parallelism "
                "(DistributedDataParallel)."
            )

    def probe(self, check: bool) -> Facts:
        """What a pass over a few tokens tells of the model. check: see __init__."""
        return verify(self.router, check, self.scores_last_block, self.config.stream_chunk_size is not None)

    def require(self, facts: Facts) -> None:
        """Refuse a model that the probe has shown not to suit the settings."""
        if self.config.stream_chunk_size is not None:
            _require_streamable(self.architecture, facts, self.config.streamed_by)
            require_no_dropout_per_call(self.architecture)
        if self.config.keeps_attention and not self.router.kernel_facts.in_pieces:
            raise UnsupportedModelError(
                f"{self.architecture.name}: keep_attention_outputs: got True, expected False: its attention is computed by its own kernel "
                f"({self.architecture.base.config._attn_implementation}), of which only the output is known. Load the model with "
                "attn_implementation='sdpa', if it can be, or leave keep_attention_outputs out."
            )
        if self.config.kv_offload and self.router.cache is not None and self.router.cache.by_hand:
            raise UnsupportedModelError(
                f"{self.architecture.name}: kv_offload: got True, expected False: its attention is written by hand, and keeps what it is given of "
                "earlier tokens on the device until backward. Leave kv_offload out."
            )

    def run(self, call: BodyCall, head: Head | None) -> Any:
        """The body's output for one call, whose backward is the method's. head: of the call of the model around it, if it is open.

        Returns None where the call is to take the model's own way.
        """
        raise NotImplementedError

    # -- for users

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()

    @property
    def router(self) -> Router:
        if self._router is None:
            raise MemTuneError(f"{type(self).__name__} was removed from this model: make a new one.")
        return self._router

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, the model's calls are its own in training too."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    def remove(self) -> None:
        """Take every trace off the model and out of transformers' interfaces; the model is bit for bit what it was. May be called twice.

        A loss that has not gone backward yet still can.
        """
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self._router is not None:
            self._router.close()
            self._router = None

    # -- on the model

    def _put_on(self) -> None:
        architecture = self.architecture
        self._undo.append(Override(architecture.base, self._body).put_on())
        self._undo.append(Override(architecture.head_model, self._model).put_on())
        if architecture.output_head is not None:
            self._undo.append(Override(architecture.output_head, self._head).put_on())
        self.router.hooks.probed()

    @property
    def _acts(self) -> bool:
        """Whether a call that could learn goes another way."""
        return torch.is_grad_enabled() and self.architecture.base.training and not self._is_aside

    def _model(self, forward: Callable, *args, **kwargs):
        """In place of the forward of the model with its head: whose call it is that the body and the head then run in."""
        if not self._acts or not self._learns(self.architecture.head_model, args, kwargs):
            return forward(*args, **kwargs)
        self._heads.append(self.make_head(kwargs))
        try:
            return forward(*args, **kwargs)
        finally:
            self._heads.pop()

    def make_head(self, inputs: dict[str, Any]) -> Head:
        """What makes logits, and takes their loss, in one call of the model with these inputs."""
        return Head(self.architecture.output_head, inputs)

    def _body(self, forward: Callable, *args, **kwargs):
        if not self._acts or not self._learns(self.architecture.base, args, kwargs):
            self._notice_evaluation_mode(args, kwargs)
            return forward(*args, **kwargs)
        self.require_gathered()
        if is_in_function_transform():
            raise MemTuneError(
                f"{self.architecture.name}: was called inside of torch.func (grad, vjp, vmap, ...), which sees through no backward pass but autograd's. "
                f"Use loss.backward() or torch.autograd.grad, or call the model without {type(self).__name__}."
            )
        self.router.call_begins()
        call = BodyCall(self.architecture, forward, args, kwargs, self.router.packs)
        found = self.run(call, self._heads[-1] if self._heads else None)
        if found is None:
            return forward(*args, **kwargs)
        return found.to_tuple() if call.returns_tuple else found

    def _notice_evaluation_mode(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Say once that a call which could learn was plain: a loop without `model.train()` would otherwise train plainly without a word."""
        could = torch.is_grad_enabled() and not self.architecture.base.training and not self._is_aside
        if could and not self._has_noticed and self._learns(self.architecture.base, args, kwargs):
            self._has_noticed = True
            logger.warning(
                "%s: a call with gradients in evaluation mode was the model's own, so %s did nothing in it. Call model.train() before a loop that "
                "trains; or use torch.no_grad() where nothing is to be learned.", self.architecture.name, type(self).__name__,
            )  # fmt: skip

    def _learns(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether any gradient can go through a module: not with adapters disabled, say."""
        given = (value.requires_grad for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return any(given) or any(p.requires_grad for p in module.parameters())

    def _head(self, forward: Callable, hidden: Tensor) -> Tensor:
        """In place of the linear head: logits that are made when they are needed."""
        if not self._heads or not torch.is_grad_enabled() or hidden.dim() != 3:
            return forward(hidden)
        return self._heads[-1].logits(forward, hidden)


def describe_as_it_runs(model: nn.Module) -> Architecture:
    """`describe`, without a plain head where somebody runs another forward in it, which may not be that of its weight and bias alone."""
    found = describe(model)
    return found if found.output_head is None or runs_its_own(found.output_head) else replace(found, output_head=None)


def _require_free(architecture: Architecture) -> None:
    there = vars(architecture.base).get("forward")
    if isinstance(there, Override) and there.is_on:
        raise ConfigError(
            [
                f"{architecture.name}: a method of hf_memtune is on this model already, whose backward pass cannot be changed twice. Call remove() of "
                "the other one; of a trainer with arguments that turn one on, leave the callback out."
            ]
        )


def _require_plain_lookups(architecture: Architecture) -> None:
    counting = [name for name, module in architecture.base.named_modules() if getattr(module, "scale_grad_by_freq", False)]
    if counting:
        raise UnsupportedModelError(
            f"{architecture.name}: {', '.join(counting)}: got scale_grad_by_freq=True, expected False: the gradient of a token is divided by how often "
            "it comes in a lookup, and a pass over a part of the tokens looks up only these. Set scale_grad_by_freq=False on the embedding."
        )


def _require_streamable(architecture: Architecture, facts: Facts, name: str | None) -> None:
    if not facts.decoder_is_causal:
        raise UnsupportedModelError(
            f"{architecture.name} is bidirectional: each of its tokens attends to later ones, so the last chunk of a row cannot go "
            f"backward before the others have gone forward with it. Expected a causal model for {name}. Leave {name} out, and use "
            "activation checkpointing, or token_seeking with token_gradient=cut."
        )
    names = ("layerdrop", "decoder_layerdrop", "encoder_layerdrop")
    dropping = {n: v for c in architecture.configs() for n in names if (v := getattr(c, n, 0))}
    if architecture.is_encoder_decoder:
        dropping.pop("encoder_layerdrop", None)  # the encoder runs once
    if dropping:
        raise UnsupportedModelError(
            "\n".join(
                f"{architecture.name}: config.{found} is {value}, and each chunk of {name} would leave out other layers. Expected 0: set "
                f"{found}=0 in the config, and on the modules that copied it, before training."
                for found, value in dropping.items()
            )
        )
