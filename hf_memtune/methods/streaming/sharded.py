"""Exact streaming of a model whose parameters FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded over processes.

HOW IT WORKS. FSDP2 gathers the parameters of a unit for its forward, and again for its backward; after that it reduces their gradient,
and frees them. Chunks run inside of backward, each through all units, and their gradients have to be summed before they are reduced.

- FSDP2 lets a unit run again between its pre-backward and its post-backward: so does activation checkpointing. All states with a module in
  the body are told that they are there. Gradients are then summed on the gathered parameters, of which nobody waits for a gradient: they
  are no inputs of the stream's node, and there are no aliases.
- FSDP2's own callback at the end of backward reduces these sums: one reduction a unit and step, however many chunks there were.
- Units that are freed after forward are gathered and freed around the forward and the backward of each chunk, one after the other, and so
  every process has to run as many chunks as any: it runs missing ones on one token. Units that stay gathered need no such agreement.

ALL PRIVATE NAMES of FSDP2 that this package uses are in this file. They were read in torch 2.13; older versions lack some.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hf_memtune.architectures import is_sharded
from hf_memtune.core.head_call import HeadOnDemand
from hf_memtune.core.recompute import is_no_container
from hf_memtune.core.sums import GradientSums
from hf_memtune.errors import LogitsError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.spans import Span
from hf_memtune.methods.head import Head
from hf_memtune.methods.layer_override import override_of
from hf_memtune.methods.overrides import forward_as
from hf_memtune.methods.streaming.chunk_stream import ChunkStream, Means, Ran
from hf_memtune.methods.streaming.encoder import encode

OLDEST = (2, 13)  # torch, read and tested


def require_known_fsdp() -> None:
    """Raises UnsupportedModelError where the installed FSDP2 is not the one whose states this file sets."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        raise UnsupportedModelError(
            f"torch {torch.__version__}: expected 2.13 or newer for sequence_chunk_size on a model that FSDP2 shards. Its units run again "
            "in the middle of backward, for which the FSDP2 of older versions has not been tried. Install torch 2.13, or use plain data "
            "parallelism (accelerate launch --multi_gpu)."
        )
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state

    wanted = {
        _fsdp_state.FSDPState: ("_register_root_post_backward_final_callback", "_pre_backward"),
        _fsdp_param_group.FSDPParamGroup: ("_reshard_after_forward", "_use_post_forward_mesh", "reshard", "unshard"),
        _fsdp_param.FSDPParam: ("accumulate_unsharded_grad_if_needed", "to_accumulated_grad_if_needed"),
    }
    missing = [f"{kind.__name__}.{name}" for kind, names in wanted.items() for name in names if not hasattr(kind, name)]
    if missing:
        raise UnsupportedModelError(
            f"torch {torch.__version__}: its FSDP2 has no {', '.join(missing)}, so it works in another way than the one with which exact "
            "streaming was tested. Use torch 2.13, or plain data parallelism (accelerate launch --multi_gpu)."
        )


def within_root_call(model: nn.Module, make: Callable[[], Any]) -> Any:
    """What `make` returns; where `model` is sharded, called in place of its forward: outside of it FSDP2 lets no part of a model run.

    On every process alike. Raises UnsupportedModelError where `model` is not all of what was sharded.
    """
    if not is_sharded(model):
        return make()
    require_known_fsdp()
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule) or model._get_fsdp_state()._is_root is False:
        raise UnsupportedModelError(
            f"{type(model).__name__} is only a part of what was sharded, or parts of it were sharded and it was not. Call fully_shard on "
            "the model itself last, and give this very model; or make this object before anything is sharded."
        )
    found = []
    with torch.no_grad(), forward_as(model, lambda: found.append(make())):
        nn.Module.__call__(model)
    return found[0]


class Units:
    """The sharded parts of a model, in one call of it.

    states: FSDP2's, of all that has a module in the body; a group of several modules (the last norm with the head) has one. groups: of
    parameters that are gathered together, those outside of the body too. freed: modules of the body that are freed after forward; the
    body itself, and groups of several modules, are there for as long as chunks run.
    """

    def __init__(self, model: nn.Module, base: nn.Module):
        require_known_fsdp()
        from torch.distributed.fsdp import FSDPModule

        modules = {m: m._get_fsdp_state() for m in base.modules() if isinstance(m, FSDPModule)}
        self.states = list(dict.fromkeys(modules.values()))
        self._model, self.groups = model, _groups_of(model)
        units = [m for m, state in modules.items() if m is not base and len(state._modules) == 1 and not state._is_root]
        self.freed = [m for m in units if any(group._reshard_after_forward for group in _groups(m))]
        self._runs_forward = False
        self._require_supported()

    def _require_supported(self) -> None:
        if any(group._use_post_forward_mesh for group in self.groups):
            raise UnsupportedModelError(
                "reshard_after_forward: got a number of processes to reshard to, expected True or False: under a number exact streaming "
                "has not been shown to be exact."
            )
        if any(parameter.is_dtensor for group in self.groups for parameter in group.fsdp_params):
            raise UnsupportedModelError(
                "the model is sharded by tensor parallelism as well as by fully_shard, under which exact streaming has not been shown to "
                "be exact. Use fully_shard alone."
            )
        if len({group.mesh_info.mesh for group in self.groups}) > 1:
            raise UnsupportedModelError(
                "units of the model are sharded over different meshes, under which exact streaming has not been shown to be exact. Give "
                "every fully_shard the same mesh."
            )
        if any(override_of(module) is not None for module in self._model.modules()):
            raise UnsupportedModelError(
                "layers of the model are reversible, or checkpointed in two levels, with which exact streaming has not been shown to be "
                "exact under FSDP2. Use activation checkpointing, or plain data parallelism (DistributedDataParallel)."
            )

    def largest(self, count: int) -> int:
        """`count`, or where units are freed, the largest one of all processes that share the model."""
        if not self.freed:
            return count
        group = _groups(self.freed[0])[0]
        agreed, mesh = torch.tensor(count, device=group.device), group.mesh_info.mesh
        for dimension in range(mesh.ndim):
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        return int(agreed)

    # -- in backward

    @contextmanager
    def running_again(self) -> Iterator[None]:
        """While open, in the middle of backward, the body can run, and go backward, as often as it likes.

        If it fails, the sums that are there are dropped, as FSDP2 does by `reset_iter_state`, which is then to be called as ever.
        """
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        _state_of(self._model)._register_root_post_backward_final_callback()
        for state in self.states:
            state._training_state = TrainingState.PRE_BACKWARD
        for group in self.groups:
            if group._training_state == TrainingState.POST_BACKWARD:  # of another call, which was reduced: there is more to come
                group._training_state = TrainingState.IDLE
        try:
            with self._gathered_one_by_one():
                yield
        except BaseException:
            for parameter in self._gathered_parameters():
                parameter._unsharded_param.grad = parameter.unsharded_accumulated_grad = None
            raise

    @contextmanager
    def forward(self) -> Iterator[None]:
        """While open, units run for the first time in a chunk; else activation checkpointing runs them."""
        self._runs_forward = True
        try:
            yield
        finally:
            self._runs_forward = False

    def settle(self) -> None:
        """A chunk has gone backward: its gradients are summed in the dtype in which FSDP2 will reduce them."""
        for parameter in self._gathered_parameters():
            _settle(parameter)
        for unit in self.freed:  # those into which no gradient goes at their beginning
            unit.reshard()

    def _gathered_parameters(self) -> Iterator[Any]:
        """FSDP2's own objects of all parameters that were gathered before, those outside of the body too."""
        for group in self.groups:
            yield from (parameter for parameter in group.fsdp_params if hasattr(parameter, "_unsharded_param"))

    @contextmanager
    def _gathered_one_by_one(self) -> Iterator[None]:
        """Units that are freed after forward are gathered for their forward, by FSDP2, and for their backward, and freed after either."""
        handles = []
        for unit in self.freed:
            unit.reshard()
            handles.append(unit.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(unit.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, unit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._runs_forward:
            return None
        leaves, spec = tree_flatten((args, kwargs), is_leaf=is_no_container)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return None
        for place, tensor in zip(places, _Passed.apply(partial(self._passed, unit), *(leaves[place] for place in places))):
            leaves[place] = tensor
        return tree_unflatten(leaves, spec)

    def _after(self, unit: Any, args: tuple, output: Any) -> None:
        if not self._runs_forward:
            return
        unit.reshard()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_gather, unit))

    def _passed(self, unit: Any) -> None:
        """A chunk has gone backward through a unit."""
        for group in _groups(unit):
            for parameter in group.fsdp_params:
                _settle(parameter)
        unit.reshard()


def _groups(unit: Any) -> list[Any]:
    return unit._get_fsdp_state()._fsdp_param_groups


def _state_of(model: nn.Module) -> Any:
    """One of FSDP2's states of a model, by which the others are found, up to the root's."""
    from torch.distributed.fsdp import FSDPModule

    return next(module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))


def _groups_of(model: nn.Module) -> list[Any]:
    """All groups of parameters, in a call of the model."""
    return [group for state in _state_of(model)._state_ctx.all_states for group in state._fsdp_param_groups]


def _gather(unit: Any, gradient: Tensor) -> None:
    """Hook of a unit's output."""
    unit.unshard()


def _settle(parameter: Any) -> None:
    parameter.accumulate_unsharded_grad_if_needed()
    parameter.to_accumulated_grad_if_needed()


class _Passed(torch.autograd.Function):
    """The identity on what goes into a unit; backward tells that all gradients of it are there."""

    @staticmethod
    def forward(ctx, tell, *tensors):
        ctx.set_materialize_grads(False)
        ctx.tell = tell
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.tell()
        return None, *gradients


class ShardedStream(ChunkStream):
    """One call of a sharded body on its way. Its node has no parameter among its inputs: see the top of this file.

    chunks: how many all processes run; those that this one has not are run on one token.
    """

    def __init__(self, means: Means, call: BodyCall, units: Units, chunks: int):
        self._units, self._chunks = units, chunks
        super().__init__(replace(means, shares_head=False), call, keeps_last=False)
        if not self.inputs:  # autograd gives no node to what depends on nothing
            self.inputs = [torch.zeros((), device=call.decoder.positions.device, requires_grad=True)]

    def _new_sums(self, base: nn.Module) -> GradientSums:
        """Of no parameter: FSDP2 keeps what is on the gathered ones."""
        return GradientSums(nn.Module())

    def _chunks_together(self) -> int:
        """One: every process has to run the body as often as any."""
        return 1

    def run_forward(self, records: Records) -> None:
        super().run_forward(records)
        with torch.no_grad():
            self._run_missing()

    def _gradients(self, cotangents: list[Tensor | None], nodes: Sequence[Any]) -> list[Tensor | None]:
        with self._units.running_again():
            found = super()._gradients(cotangents, nodes)
            with torch.enable_grad():
                self._run_missing()
        return found or [None]

    def _go_backward(self, number: int, cotangents: list[Tensor | None]) -> None:
        super()._go_backward(number, cotangents)
        self._units.settle()

    def _run(self, number: int, span: Span, stores: bool) -> Ran:
        with self._units.forward():
            return super()._run(number, span, stores)

    def _run_missing(self) -> None:
        """What other processes have more of: the body on one token, and backward with a gradient of 0. Nothing is drawn for it."""
        for _ in range(self._chunks - self.count):
            with self.autocast.restored(), self.tape.replaying("missing"), self._units.forward():
                hidden = self.call.forward(**self._one_token(), use_cache=False).last_hidden_state
            if hidden.requires_grad:
                torch.autograd.backward(hidden, torch.zeros_like(hidden))
                self._units.settle()

    def _one_token(self) -> dict[str, Any]:
        """The first token of the batch as arguments of the body: connected where the batch is, so that as much goes backward."""
        call, architecture = self.call, self.router.architecture
        prefix = "decoder_" if architecture.is_encoder_decoder else ""
        names = [name for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds") if name in call.arguments]
        given = {name: call.arguments[name] for name in names}
        given = {name: whole[:1, :1].detach().requires_grad_(whole.requires_grad) for name, whole in given.items()}
        if call.encoded is not None:
            given["encoder_outputs"] = (call.encoded[:1].detach().requires_grad_(call.encoded.requires_grad),)
        return given


def sharded_stream(model: nn.Module, means: Means, call: BodyCall) -> ShardedStream | None:
    """The stream of one call; None where all processes have one chunk, and take the model's own way, which is plain training.

    Where they do not ask one another, a row of one chunk is a stream as well: all have to reduce gradients in one order.
    """
    if means.router.cache is not None:
        raise UnsupportedModelError(
            f"{means.router.architecture.name}: {means.router.cache.why_all_tokens}; under FSDP2 exact streaming of such layers has not been shown to "
            "be exact. Use plain data parallelism (accelerate launch --multi_gpu)."
        )
    units = Units(model, means.router.architecture.base)
    chunks = units.largest(math.ceil(call.decoder.length / means.chunk))
    return None if units.freed and chunks == 1 else ShardedStream(means, encode(call), units, chunks)


# -- the head


class ShardedHead(Head):
    """The head in one call of a sharded model. Its logits are made on demand only where its weight stays gathered until backward."""

    def __init__(self, model: nn.Module, linear: nn.Linear | None, inputs: dict[str, Any]):
        super().__init__(linear, inputs)
        self._model = model

    def logits(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return super().logits(forward, hidden) if hidden.requires_grad and self._stays() else forward(hidden)

    def of(self, forward: Callable[[Tensor], Tensor]) -> HeadOnDemand:
        return _ShardedOnDemand(partial(self._as_gathered, forward), self.weight, self.there.bias)

    def _as_gathered(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if _is_shard(self.there.weight):
            raise LogitsError(
                "logits are wanted only after backward, with which FSDP2 has let go of the weight of the head. Read them before, or keep "
                "logits.clone() + 0 of them."
            )
        return forward(hidden)

    def _stays(self) -> bool:
        if _is_shard(self.there.weight):
            return False
        weight, groups = self.there.weight, _groups_of(self._model)
        own = [group for group in groups if any(getattr(p, "_unsharded_param", None) is weight for p in group.fsdp_params)]
        return not any(group._reshard_after_forward for group in own)


def _is_shard(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


class _ShardedOnDemand(HeadOnDemand):
    def is_signal(self, hook: Callable) -> bool:
        """FSDP2 hangs a hook on all that a unit returns, by which it learns that backward has come to the unit."""
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

        return isinstance(getattr(hook, "__self__", None), FSDPState)
