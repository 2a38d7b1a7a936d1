"""Differences between the supported versions of torch and transformers. Each shim names the version at which it goes."""

import torch


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no values (FakeTensorMode: memory is being traced, not used)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def with_values():
    """Context manager in which new tensors have values even while memory is being traced."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def packed_mask_function(mask_function, positions, segments):
    """The rule of a packed row, made as the installed transformers makes it, from that of a row that is one sequence."""
    from transformers import masking_utils

    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(mask_function, positions, segments)
    # transformers < 5.23 keeps the row's own indices within a sequence; goes when 5.23 is the oldest supported version
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(segments))


def is_quantised_kernel(module: torch.nn.Module) -> bool:
    """Whether a module is one of bitsandbytes', which have no dropout, and for which evaluation mode is not innocent.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight for good at its first forward in evaluation mode, for an
    operator without a derivative: from then on no gradient passes the layer, and none is missed. Its way back is not exact.
    """
    return type(module).__module__.startswith("bitsandbytes.")


def forbid_4bit_repacking(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Keep the 4-bit weights of a model as they are in evaluation mode. Returns the modules this changed."""
    repacking = [
        module for module in model.modules() if is_quantised_kernel(module) and vars(module).get("support_avx512bf16_for_cpu", False)
    ]
    for module in repacking:
        module.support_avx512bf16_for_cpu = False
    return repacking


def allow_4bit_repacking(modules: list[torch.nn.Module]) -> None:
    """Undo what `forbid_4bit_repacking` changed."""
    for module in modules:
        module.support_avx512bf16_for_cpu = True


def has_repacked_4bit(model: torch.nn.Module) -> bool:
    """Whether an evaluation has already repacked a 4-bit weight."""
    weights = (getattr(module, "weight", None) for module in model.modules() if is_quantised_kernel(module))
    return any(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) for weight in weights)


def wait_for(device: torch.device) -> None:
    """Until a device has done what was asked of it: launches return before, and would be timed in place of the work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(*which(device))


def which(device: torch.device) -> tuple[torch.device, ...]:
    """What functions of a device's module take to say which is meant: of mps there is one, and its module takes no name for it."""
    return () if device.type == "mps" else (device,)


def accumulates(node) -> bool:
    """Whether the backward pass that runs will add a gradient to `.grad` through this node of a leaf: not in torch.autograd.grad.

    torch has no public way to ask from inside backward; of a leaf's node under torch.autograd.grad the private one raises.
    """
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


def has_hooks(node) -> bool:
    """Whether anybody has hung a hook of Python's on a node of autograd, before it or after it; not what C++ hangs there, as DDP does.

    torch lists them nowhere. One more of a kind is put where the others are, if there are any, and taken away again.
    """
    for register in (node.register_prehook, node.register_hook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False


def caches_parametrizations(module: torch.nn.Module) -> bool:
    """Whether weights that parametrizations make in `module` are kept for further runs (`torch.nn.utils.parametrize.cached`)."""
    from torch.nn.utils import parametrize

    return bool(parametrize._cache_enabled) and any(map(parametrize.is_parametrized, module.modules()))


def buffers_are_copied() -> bool:
    """Whether the call that runs is one of DistributedDataParallel, which writes the first process' buffers into those of the others before each call."""
    from torch.nn.parallel import DistributedDataParallel

    active = DistributedDataParallel._active_ddp_module
    return active is not None and active.forward_sync_buffers


def is_sink_of_ddp(node) -> bool:
    """Whether a node is the one through which DistributedDataParallel hands out what a model returns, where parameters may be left unused: its
    backward passes gradients on as they come. Not that of a static graph, in which the sums over processes begin, too.
    """
    from torch.nn.parallel import distributed

    return getattr(type(node), "_forward_cls", None) is distributed._DDPSink and not node.ddp_weakref().static_graph


def _nothing(*args) -> None: ...


def is_in_function_transform() -> bool:
    """Whether torch.func (grad, vjp, vmap, ...) is at work on what runs now. torch has no public question for it."""
    return torch._C._functorch.peek_interpreter_stack() is not None
