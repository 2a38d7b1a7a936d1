"""A part of a model that runs without a graph, and runs again, piece by piece, when backward comes: one node of autograd.

    y = f(x, theta), without a graph;    (dL/dx, dL/dtheta) = replay(dL/dy)

Whatever L is, and of however many such calls, dL/dy of all tokens is known when the node's turn comes: so the pieces can go backward in
any order, as long as together they find what f's own graph would have found. Parameters are inputs of the node, and their gradients are
returned: whoever waits for them (DistributedDataParallel, torch.autograd.grad, hooks) finds them as after any other node.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_memtune.errors import MemTuneError


class Replay(Protocol):
    """One call that can go backward once.

    inputs: the tensors whose gradients it finds. take_outputs: the tensors that it gave, held by it no longer, so that they live only as long
    as somebody uses them.
    """

    inputs: list[Tensor]

    def take_outputs(self) -> list[Tensor]: ...

    def backward(self, cotangents: Sequence[Tensor | None], nodes: Sequence[Any]) -> Sequence[Tensor | None]:
        """Gradients of `inputs`. cotangents: dL/d(output) of each, None for 0. nodes: what autograd hands the gradients to."""


def replayed(replay: Replay) -> tuple[Tensor, ...]:
    """The outputs of a replay, connected to its inputs.

    Backward can run once: a second one, with retain_graph=True, raises MemTuneError. Gradients of gradients raise RuntimeError.
    """
    return _Replayed.apply(replay, *replay.inputs)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, replay, *inputs):
        ctx.set_materialize_grads(False)
        ctx.replay = replay
        outputs = replay.take_outputs()
        ctx.mark_non_differentiable(*(o for o in outputs if not (o.is_floating_point() or o.is_complex())))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        if ctx.replay is None:
            raise MemTuneError(
                "backward came a second time to a call of the model whose keys and values are gone. Call the model again for each backward, "
                "or add the losses up and go backward once; retain_graph=True keeps nothing of this call."
            )
        replay, ctx.replay = ctx.replay, None
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (1 + len(replay.inputs))
        nodes = [node for node, _ in ctx.next_functions]  # of tensors alone, so the replay has none
        if any(cotangent is not None and cotangent.requires_grad for cotangent in cotangents):
            nodes = [None] * len(nodes)  # create_graph: all must be handed out from here, for nobody may differentiate it again
        return None, *replay.backward(cotangents, nodes)
