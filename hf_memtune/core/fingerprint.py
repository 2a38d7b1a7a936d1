"""What decides, beside its arguments, what a module computes, and may change between a call and the run that repeats it in backward.

Plain autograd keeps what forward computed. A run that computes it again would silently find the gradient of another function where, in
between, the module went into evaluation mode (dropout), an adapter was switched, merged or scaled, another attention was chosen, or a hook
came or went.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hf_memtune.errors import InverseError

_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # of PEFT's layers
_NOT_ADAPTED = (None,) * len(_ADAPTERS)
_KERNELS = ("_attn_implementation", "_experts_implementation")  # of a module's config
_FIELDS = ("module", "training", "forward pre-hooks", "forward hooks", *_KERNELS, *_ADAPTERS)
# The first puts hooks on at the first call that asks for what they record, for good; those of the second only watch others.
_ONLY_LOOK = ("transformers.utils.output_capturing", "hf_memtune.methods.attention.hooked")
REQUIRE_GRAD = "make_inputs_require_grad"  # as transformers, peft and trl call such hooks


class Fingerprint:
    """The state of `module` and all within it at this moment. Hooks of `module` itself are left out: they are no part of its forward.

    It takes about 2 microseconds for each module, and does not hold the values of any tensor.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._states, self._versions = _states_of(module)

    def forget(self, changing: set[int]) -> None:
        """Let frozen weights, by identity, change: those that the call itself changes."""
        self._versions = {key: version for key, version in self._versions.items() if key not in changing}

    def check(self, name: str = "") -> None:
        """Raises InverseError, a MemTuneError, which names the first module that differs now. name: that of the module itself."""
        states, versions = _states_of(self._module)
        if states != self._states:
            raise InverseError(self._difference(states, name))
        # by identity, for offloading replaces parameters; those that are trained are checked where they are collected
        if any(versions.get(key, version) != version for key, version in self._versions.items()):
            raise InverseError(
                f"{name or type(self._module).__name__}: frozen weights were changed in place between a call and its backward, which runs "
                "the call again. Change them before the call, or after backward."
            )

    def _difference(self, states: Sequence[tuple], name: str) -> str:
        place = next((i for i, (now, then) in enumerate(zip(states, self._states)) if now != then), min(len(states), len(self._states)))
        names = {id(module): inner for inner, module in self._module.named_modules()}
        now, then = (each[place] if place < len(each) else (None,) for each in (states, self._states))
        where = ".".join(part for part in (name, names.get(now[0] if now[0] in names else then[0], "")) if part)
        what = "the modules within"
        field = next((i for i, (a, b) in enumerate(zip(now, then)) if a != b), 0)
        if field:
            what = f"{_FIELDS[field]} (got {now[field]}, expected {then[field]} as in the call)"
        return (
            f"{where or type(self._module).__name__}: between a call and its backward, which runs the call again, this changed: {what}. "
            "Go backward before you change it, or change it back until backward is over."
        )


class Alike:
    """`function` for runs that repeat each other: the first notes the state of `module`, and each further one requires the same.

    It looks where the function runs, inside of the contexts that are made around it.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable):
        self._module, self._name, self._function = module, name, function
        self._found: Fingerprint | None = None

    def __call__(self, *args, **kwargs) -> Any:
        if self._found is None:
            self._found = Fingerprint(self._module)
        else:
            self._found.check(self._name)
        return self._function(*args, **kwargs)


def _states_of(root: nn.Module) -> tuple[list[tuple], dict[int, int]]:
    """Of every module, in order: its identity and the values of _FIELDS, as far as it has any; versions of frozen parameters, by identity."""
    states: list[tuple] = []
    versions, left = {}, [root]
    while left:  # modules() alone would take half of the time
        module = left.pop()
        own = module.__dict__
        before, after = (own["_forward_pre_hooks"], own["_forward_hooks"]) if module is not root else ((), ())
        state: tuple = id(module), own["training"], _hooks(before) if before else (), _hooks(after) if after else ()
        is_adapted = "_disable_adapters" in own or hasattr(type(module), "_disable_adapters")  # until it is set it may be of the class
        if (config := own.get("config")) is not None or is_adapted:
            state = *state, *_kernels(config), *(_adapters(module) if is_adapted else _NOT_ADAPTED)
        states.append(state)
        for parameter in own["_parameters"].values():
            if parameter is not None and not parameter.requires_grad and not parameter.is_inference():
                versions[id(parameter)] = parameter._version
        if own["_modules"]:
            left.extend(child for child in reversed(own["_modules"].values()) if child is not None)
    return states, versions


def _hooks(hooks: dict[int, Any]) -> tuple[int | str, ...]:
    """Their keys, which torch uses once. Those that record what a caller asked for may come with a later call.

    Of those that let embeddings require grad, however many there are: trl turns checkpointing off and on between a call and its backward.
    """
    found: dict[int | str, None] = {}
    for key, hook in hooks.items():
        if getattr(hook, "__module__", None) not in _ONLY_LOOK:
            found[REQUIRE_GRAD if getattr(hook, "__name__", "").startswith(REQUIRE_GRAD) else key] = None
    return tuple(found)


def _kernels(config: Any) -> tuple:
    return (None, None) if config is None else tuple(_hashable(getattr(config, name, None)) for name in _KERNELS)


def _adapters(module: nn.Module) -> tuple:
    return tuple(_hashable(getattr(module, name, None)) for name in _ADAPTERS)


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _hashable(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if value is None or isinstance(value, (str, int, float)) else id(value)
