"""Looking at an autograd graph from what it ends in."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes_behind(outputs: Iterable[Tensor], known: Iterable[Any] = ()) -> Iterator[Any]:
    """Each node of the graph that the outputs come from, once. known: nodes that are left out, with what is behind them alone."""
    seen = {None, *known}
    left: list[Any] = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        left += [following for following, _ in node.next_functions]


def leaf_of(node: Any) -> Tensor | None:
    """The tensor that this node sums a gradient on; None: it is another kind of node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
