"""The slow, obviously right twin of a reversible stack: the same two streams under plain autograd, which keeps everything.

In fixed point the values are those of the same integers, and gradients go straight through the rounding.
"""

import torch

from hf_memtune.core.coupling import NEWEST, OLDER


class TwinStack:
    """Called as the reversible stack is."""

    def __call__(self, blocks, coupling, arithmetic, hidden, beside, weights=(1.0, 0.0)):
        pair, streams = self.enter(arithmetic, hidden)
        for block in blocks:
            pair, streams, _ = self.layer(coupling, arithmetic, block.functions(), pair, streams, (beside,), {})
        return self.leave(pair, weights)

    def enter(self, arithmetic, hidden):
        stream = arithmetic.enter(hidden.detach())
        value = straight_through(hidden, arithmetic.value(stream))
        return [value.view_as(value), value.view_as(value)], [stream, stream]

    def layer(self, coupling, arithmetic, functions, pair, streams, args, kwargs):
        pair, streams, extras = list(pair), list(streams), None
        for half in coupling.halves:
            source, target = pair[half.source], pair[half.target]
            found, beside = functions[half.function](source, *args, **kwargs)
            extras = beside if beside is not None else extras
            update = half.update(found, source)
            plain = half.scale * target.to(update.dtype) + update
            streams[half.target], _ = arithmetic.blend(streams[half.target], half.scale, update.detach())
            # viewed after all that was made of the source, as it is passed on: sums are then formed in one order
            pair[half.source] = source.view_as(source)
            pair[half.target] = straight_through(plain.to(target.dtype), arithmetic.value(streams[half.target]))
        return coupling.settled(tuple(pair)), coupling.settled(tuple(streams)), extras

    def leave(self, pair, weights):
        return weights[NEWEST] * pair[NEWEST] + weights[OLDER] * pair[OLDER]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shown):
        return shown.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def straight_through(value, shown):
    """`shown`, with the gradient of `value`."""
    return _StraightThrough.apply(value, shown.detach())
