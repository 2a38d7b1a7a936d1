"""What a context pass leaves for scoring.

Shape legend: B rows, H query heads, S tokens of a chunk, D hidden size, C channels of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from hf_memtune.architectures import Architecture
from hf_memtune.methods.attention.model_pass import ModelPass


class Records:
    """What a context pass leaves for scoring: inputs of the last block, and queries of the context layer, by stack.

    hidden: chunks (B, S, D) of the last block's input. queries: chunks (B, H, S, C) after rotary embedding.
    calls: of the context layer, its attention module's id, its mask rule, and its scaling, softcap and sinks.
    wanted: False where nothing will be scored, and so nothing is recorded.
    """

    def __init__(self, context_modules: dict[int, str], wanted: bool = True):
        self.context_modules, self.wanted = context_modules if wanted else {}, wanted
        self.hidden: dict[str, list[Tensor]] = {}
        self.queries: dict[str, list[Tensor]] = {}
        self.calls: dict[str, tuple[int, Callable, dict]] = {}

    def clear(self) -> None:
        """Let go of what was recorded, before the focus pass needs the memory."""
        self.hidden.clear()
        self.queries.clear()

    def attention_call(self, running: ModelPass, module: nn.Module, query: Tensor, mask, kwargs: dict) -> None:
        stack = self.context_modules.get(id(module))
        if stack is None or running.places.is_cross(module):
            return
        self.queries.setdefault(stack, []).append(query.detach())
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        call = {"scaling": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
        rule = running.rule_of(mask, stack) if running.has_rules else bidirectional_mask_function
        self.calls[stack] = (id(module), rule, call)

    @contextmanager
    def of_last_blocks(self, architecture: Architecture) -> Iterator[None]:
        """While open, the inputs of the last blocks are recorded."""
        with ExitStack() as stack:
            for name, part in architecture.stacks.items():
                hook = partial(self.last_input, name)
                stack.callback(part.layers[-1].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def last_input(self, stack: str, module, args, kwargs) -> None:
        """Forward pre-hook of the last block of a stack."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(hidden, Tensor):  # or what travels between reversible layers: the last of them does not run alone
            self.hidden.setdefault(stack, []).append(hidden.detach())
