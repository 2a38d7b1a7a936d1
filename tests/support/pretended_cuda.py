"""A CUDA device that is not there: tensors that say `cuda:0`, with values, computed on the CPU.

What a tensor on a GPU may not do raises: to meet one on the CPU, or to come to a kernel that would refuse it (`cuda_kernels`). What makes
the processor wait for the device is counted. Streams do nothing, and random numbers are those of the CPU.
Needs what `environment` sets, in a process that it was started with.
"""

import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.support import cuda_kernels

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
WAITED_FOR = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default}
KERNELS = {getattr(aten, name).default: kernel for name, kernel in cuda_kernels.ATEN.items()}
SYNCS: Counter = Counter()


def environment(folder: Path) -> dict[str, str]:
    """Variables to start a process with. Raises RuntimeError where the device cannot be made: no compiler, or a torch with CUDA."""
    compiler, torch_folder, made = shutil.which("g++"), Path(torch.__file__).parent, folder / "pretended_cuda.so"
    if compiler is None or sys.platform != "linux" or torch.version.cuda is not None:
        raise RuntimeError("needs g++, Linux, and a torch without CUDA of its own")
    include, libraries = torch_folder / "include", torch_folder / "lib"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", Path(__file__).with_suffix(".cpp"), f"-I{include}", f"-L{libraries}"]
    built = subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", made], capture_output=True, text=True)
    assert not built.returncode, f"does not compile against torch {torch.__version__}: {built.stderr[-500:]}"
    return os.environ | {"LD_PRELOAD": str(made), "LD_LIBRARY_PATH": str(libraries)}


class OnCuda(torch.Tensor):
    """inner: the values, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=CUDA, **layout)
        made.inner = inner
        return made

    def __repr__(self):
        return f"OnCuda({self.inner!r})"

    def tolist(self):
        SYNCS[f"tolist, {_where()}"] += 1
        return self.inner.tolist()

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts, meta, size, stride):
        return OnCuda(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What is made on the device out of nothing."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Stream:
    def __init__(self, device=None): ...
    def wait_stream(self, other): ...
    def wait_event(self, event): ...
    def record_event(self):
        return object()


@contextmanager
def pretended() -> Iterator[None]:
    """While open, there is a device."""
    plain_tensor = torch.tensor

    def tensor(data, *args, device=None, **kwargs):  # which goes by no dispatcher
        made = plain_tensor(data, *args, **kwargs)
        return made if device is None else made.to(device)

    instead = {
        "_lazy_init": lambda: None, "Stream": _Stream, "current_stream": _Stream, "stream": nullcontext, "device_count": lambda: 1,
        "get_rng_state": lambda device=None: torch.get_rng_state(), "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }  # fmt: skip
    allowed = {"can_use_flash_attention": cuda_kernels.can_use_flash, "can_use_efficient_attention": cuda_kernels.can_use_efficient}
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **instead))
        stack.enter_context(patch.multiple(torch.backends.cuda, **allowed))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(_Factories())
        yield


@contextmanager
def chosen() -> Iterator[None]:
    """While open beside `pretended`, the device is the one that trainers take, and has an allocator. Import what is needed before."""
    properties = SimpleNamespace(total_memory=2**34, major=8, minor=6, multi_processor_count=1, name="pretended")
    nothing = {
        name: lambda *args: None for name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache", "manual_seed_all")
    }
    numbers = {"max_memory_allocated": 2**20, "memory_allocated": 2**20, "memory_reserved": 2**21, "mem_get_info": (2**33, 2**34)}
    found = {"is_available": True, "current_device": 0, "get_device_properties": properties, "get_device_capability": (8, 6), **numbers}
    told = {name: lambda *args, value=value: value for name, value in found.items()}
    with patch.multiple(torch.cuda, **nothing, **told):
        yield


def moved(value):
    """A tensor, or a model in place, on the device; anything else as it is."""
    if isinstance(value, torch.nn.Module):
        made = {id(None): None}
        for holder in [holder for module in value.modules() for holder in (module._parameters, module._buffers)]:
            for name, tensor in holder.items():
                if id(tensor) not in made:
                    on_cuda = OnCuda(tensor.detach())
                    is_learned = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(on_cuda, tensor.requires_grad) if is_learned else on_cuda
                holder[name] = made[id(tensor)]
        return value
    return OnCuda(value) if isinstance(value, torch.Tensor) else value


def _run(operation, args, kwargs):
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    call = SimpleNamespace(
        operation=operation, args=args, kwargs=kwargs, here=here, elsewhere=[t for t in tensors if not isinstance(t, OnCuda)]
    )
    call.device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    _refuse(call)
    if reason := _waits(call):
        SYNCS[f"{reason}, {_where()}"] += 1
    inner_args, inner_kwargs = pytree.tree_map(_inner, (args, kwargs))
    inner_kwargs.pop("pin_memory", None)
    found = KERNELS.get(operation, operation)(*inner_args, **inner_kwargs)
    first = args[0] if operation is aten.copy_.default else None
    if not (isinstance(first, OnCuda) if first is not None else call.device == "cuda" if call.device else here):
        return found
    found = pytree.tree_map_only(torch.Tensor, lambda value: value if isinstance(value, OnCuda) else OnCuda(value), found)
    return return_and_correct_aliasing(operation, args, kwargs, found)


def _inner(value):
    if isinstance(value, OnCuda):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _refuse(call) -> None:
    """A number may come from the CPU, and so may what indexes."""
    if not call.here or call.operation in COPIES:
        return
    others = [tensor for tensor in call.elsewhere if tensor.dim()]
    if call.operation in INDEXED:
        others = [tensor for tensor in others if any(tensor is arg for arg in call.args)]
    if others:
        raise RuntimeError(f"{call.operation}: tensors on cuda and on the cpu, {[tuple(tensor.shape) for tensor in others]}")


def _waits(call) -> str | None:
    """What the processor waits for; None: nothing."""
    if call.operation in INDEXED:
        by_bool = any(isinstance(index, OnCuda) and index.dtype == torch.bool for index in pytree.tree_leaves(call.args[1]))
        return f"{call.operation} by bool" if by_bool else None
    if call.operation in WAITED_FOR:
        return str(call.operation) if call.here else None
    if (
        call.operation not in COPIES
        or call.kwargs.get("non_blocking")
        or call.operation is aten.copy_.default
        and call.args[2:3] == (True,)
    ):
        return None
    if call.operation is aten.copy_.default:
        target, source = call.args[:2]
        crosses = isinstance(target, OnCuda) is not isinstance(source, OnCuda) and source.dim()
    else:
        crosses = call.device is not None and (call.device == "cuda") is not bool(call.here)
    return "copy between devices" if crosses else None


def _where() -> str:
    own = [
        frame for frame in traceback.extract_stack() if "hf_memtune" in Path(frame.filename).parts[:-1] and "support" not in frame.filename
    ]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[::-1][:3]) or "outside"
