"""A module that runs without a graph, and goes backward in parts of its rows: the smallest thing that `core.replay` can replay."""

import torch

from hf_memtune.core.replay import replayed
from hf_memtune.core.sums import GradientSums


class Parts:
    """`module` on `x` (rows, size), some rows at a time. A `core.replay.Replay`."""

    def __init__(self, module, x, parts=3):
        self.module, self.x, self.parts = module, x, parts
        self.sums = GradientSums(module)
        self.inputs = [x, *self.sums.parameters]
        with torch.no_grad():
            self._outputs = [module(x)]

    def take_outputs(self):
        taken, self._outputs = self._outputs, []
        return taken

    def backward(self, cotangents, nodes):
        self.sums.begin(nodes[1:])
        leaf = self.x.detach().requires_grad_(self.x.requires_grad)
        with torch.enable_grad(), self.sums.standing_in():
            for rows, given in zip(leaf.chunk(self.parts), cotangents[0].chunk(self.parts)):
                torch.autograd.backward(self.module(rows), given)
        return [leaf.grad, *self.sums.take()]


def in_parts(module, x, parts=3):
    """`module(x)`, which goes backward in parts."""
    (output,) = replayed(Parts(module, x, parts))
    return output
