"""Everything that a step of training changes, kept beside it, so that a step can be tried and taken back bit by bit.

Kept in host memory: trained parameters, buffers, optimizer state. Frozen parameters are not copied: nothing writes to them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.memory.optimizer_layout import unwrapped_optimizer
from hf_memtune.training.restorable import keep_counters, keep_plain
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer


@contextmanager
def everything_restored(trainer: RunningTrainer) -> Iterator[None]:
    """Whatever training steps do meanwhile is undone at the end, also where they fail.

    Restored: trained parameters, buffers and plain attributes of modules (counters, training mode); state, settings and counters of the
    optimizer; scheduler; gradient scaler; Python's, numpy's and torch's generators; the trainer's own numbers and containers of numbers.
    Gradients are None afterwards, as they are at the beginning of a step. Not restored: what lies outside of these, such as the
    bucket order of DistributedDataParallel, which is settled in its first step.
    """
    with preserved_rng(trainer.args.device), ExitStack() as undo:
        for kept in _kept_of_trainer(trainer):
            undo.callback(kept)
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)


def _kept_of_trainer(trainer: RunningTrainer) -> Iterator[Callable[[], None]]:
    yield keep_module(trainer.model)
    yield keep_counters(trainer)
    optimizer = trainer.optimizer
    yield keep_optimizer(unwrapped_optimizer(optimizer))
    yield keep_plain(optimizer)
    yield _keep_state_dict(trainer.lr_scheduler)
    if (scaler := trainer.accelerator.scaler) is not None:
        yield _keep_state_dict(scaler)
    yield _keep_flags(trainer)


def keep_module(module: nn.Module) -> Callable[[], None]:
    """What puts trained parameters, buffers and plain attributes of all submodules back."""
    trained = [(p, _on_host(p)) for p in module.parameters() if p.requires_grad]
    # by place, not by tensor: rotary embeddings of growing rows put another tensor there
    buffers = [(m, name, b, None if b is None else _on_host(b)) for m in module.modules() for name, b in m._buffers.items()]
    plain = [keep_plain(m, containers=False) for m in module.modules()]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in trained:
                parameter.copy_(value)
            for owner, name, buffer, value in buffers:
                owner._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(value)
        for undo in plain:
            undo()

    return restore


def keep_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What puts the optimizer back: a fresh one is fresh again. Not by state_dict, whose loading casts to the parameters' dtype."""
    state = {parameter: {key: (value, _copied(value)) for key, value in held.items()} for parameter, held in optimizer.state.items()}
    groups = [{key: (value, _copied(value)) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    plain = keep_plain(optimizer)

    def restore() -> None:
        for parameter in [p for p in optimizer.state if p not in state]:
            del optimizer.state[parameter]
        for parameter, held in state.items():
            _put_back(optimizer.state[parameter], held, but=())
        for group, held in zip(optimizer.param_groups, groups):
            _put_back(group, held, but=("params",))
        plain()

    return restore


def _keep_state_dict(owner: Any) -> Callable[[], None]:
    state = copy.deepcopy(owner.state_dict())
    return lambda: owner.load_state_dict(state)


def _keep_flags(trainer: RunningTrainer) -> Callable[[], None]:
    """Which micro-batch of an accumulation this is, and the batches of the step that waits."""
    gradients, batches = trainer.accelerator.gradient_state, trainer.batches_of_step
    syncs = gradients.sync_gradients

    def restore() -> None:
        gradients._set_sync_gradients(syncs)
        trainer.batches_of_step = batches

    return restore


# -- values


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _copied(value: Any) -> Any:
    return _on_host(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _put_back(place: dict[str, Any], held: dict[str, tuple[Any, Any]], but: tuple[str, ...]) -> None:
    """Tensors into the tensor they were in, so that whoever holds it sees it; all else as the copy that was kept."""
    for key in [key for key in place if key not in held and key not in but]:
        del place[key]
    for key, (original, value) in held.items():
        if isinstance(original, Tensor):
            with torch.no_grad():
                original.copy_(value)
            place[key] = original
        else:
            place[key] = value
