"""`sequence_chunk_size=auto`: the fastest size whose step on the longest batch fits, chosen before step 0.

What a step needs is predicted, so that nothing runs out of memory on the way; how long it takes is measured, on the first tokens of that
batch. Every process of a launch comes to the same size: that of the tightest budget, by the clock of the first.
"""

import logging
import sys
import time
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from hf_memtune._compat import wait_for
from hf_memtune.errors import ConfigError, MemTuneError, first_line
from hf_memtune.memory import available_bytes
from hf_memtune.memory.residents import bytes_held
from hf_memtune.methods.streaming.method import Streaming
from hf_memtune.settings.streaming import StreamingConfig
from hf_memtune.training.care.preflight.longest import Longest, longest_batch
from hf_memtune.training.care.preflight.snapshot import everything_restored
from hf_memtune.training.care.recovery.advice import advice, advice_on_evaluation
from hf_memtune.training.care.savings import BatchShape, predicted_step, why_unpredicted
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer
from hf_memtune.units import format_bytes, parse_bytes

logger = logging.getLogger(__name__)

SIZES = (2048, 1024, 512, 256, 128)  # beside the whole row; smaller ones hardly save more
TIMED = 3  # sizes that fit, the largest first: smaller chunks are slower, but for the attention of very long ones
CHUNKS_TIMED = 2  # of the largest size that is cut, so that one attends to another


def choose_chunk(trainer: RunningTrainer, config: StreamingConfig) -> int:
    """The tokens of a chunk for this trainer, whose training is about to begin and whose model has no method on.

    Raises ConfigError where nothing is known of the longest batch or of what its step needs, and where no size fits.
    """
    longest, shape = _longest(trainer)
    budget = min(gather_object([_budget(trainer, config)]))
    found = _estimates(trainer, shape, budget)
    peaks = {size: estimate.peak_bytes for size, estimate in found.items()}
    fitting = [size for size, peak in peaks.items() if peak <= budget]
    if not fitting:
        raise ConfigError([_no_room(trainer, found, budget, longest)])
    seconds = _timed(trainer, config, fitting, shape, longest.batch)
    chosen = [min(seconds, key=seconds.__getitem__)]
    broadcast_object_list(chosen)
    _tell(trainer, shape, chosen[0], peaks, budget, seconds)
    return chosen[0]


def _longest(trainer: RunningTrainer) -> tuple[Longest, BatchShape]:
    loader = trainer.callback_handler.train_dataloader
    with preserved_rng(trainer.args.device, loader.collate_fn, loader.dataset):
        found = longest_batch(loader, trainer._train_batch_size)
    if found is not None and found.tokens is not None and (shape := BatchShape.of(found.batch)) is not None:
        return found, shape
    raise ConfigError(
        [
            "sequence_chunk_size: got 'auto', but the length of the longest row is not known: the data set has no length, or its rows or batches no input_ids. "
            "Give a number of tokens, such as 512."
        ]
    )


def _budget(trainer: RunningTrainer, config: StreamingConfig) -> int:
    """Bytes for tensors, of this process; those of a CPU are shared by all that may be on it."""
    if config.chunk_budget is not None:
        return parse_bytes(config.chunk_budget)
    device = trainer.args.device
    found = available_bytes(device, bytes_held(trainer.model, trainer.optimizer))
    return found // trainer.args.world_size if device.type == "cpu" else found


def _estimates(trainer: RunningTrainer, shape: BatchShape, budget: int) -> dict[int, Any]:
    """The estimate of the step by size, from the whole row down, until enough fit to be timed."""
    why = "parameters are spread over processes (FSDP)" if trainer.is_fsdp_enabled else why_unpredicted(trainer)
    if why is not None:
        raise ConfigError(
            [f"sequence_chunk_size: got 'auto', but {why}, and its memory is not predicted. Give a number of tokens, such as 512."]
        )
    found: dict[int, Any] = {}
    for size in (shape.tokens, *(size for size in SIZES if size < shape.tokens)):
        if sum(estimate.peak_bytes <= budget for estimate in found.values()) == TIMED:
            break
        found[size] = _predicted(trainer, shape, size)
    return found


def _predicted(trainer: RunningTrainer, shape: BatchShape, size: int) -> Any:
    """The estimate of a step in chunks of a size."""
    try:
        return predicted_step(trainer, shape, {"sequence_chunk_size": size, "chunk_budget": None})
    except MemTuneError as error:
        raise ConfigError(
            [f"sequence_chunk_size: got 'auto', but no step can be predicted: {first_line(error)}. Give a number of tokens, such as 512."]
        ) from error


def _timed(trainer, config: StreamingConfig, sizes: list[int], shape: BatchShape, batch: dict[str, Any]) -> dict[int, float]:
    """Seconds of forward and backward of the same first tokens, by size. Everything is as it was afterwards."""
    if len(sizes) == 1:
        return {sizes[0]: 0.0}
    cut = max((size for size in sizes if size < shape.tokens), default=shape.tokens)
    inputs = trainer._prepare_inputs(_first_tokens(batch, min(shape.tokens, CHUNKS_TIMED * cut)))
    with everything_restored(trainer):
        return {size: _seconds(trainer, StreamingConfig.of(config, sequence_chunk_size=size, chunk_budget=None), inputs) for size in sizes}


def _first_tokens(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The beginning of every row."""
    tokens = batch["input_ids"].shape[1]
    return {
        name: value[:, :count] if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == tokens else value
        for name, value in batch.items()
    }


def _seconds(trainer: RunningTrainer, config: StreamingConfig, inputs: dict[str, Any]) -> float:
    """The second of two steps: the first gets its memory from the system."""
    trainer.model.train()
    with Streaming(trainer.model, config, check=False):
        for _ in range(2):
            wait_for(trainer.args.device)
            began = time.perf_counter()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, dict(inputs))
            loss.backward()
            wait_for(trainer.args.device)
            seconds = time.perf_counter() - began
            trainer.model.zero_grad()
    return seconds


def _no_room(trainer: RunningTrainer, found: dict[int, Any], budget: int, longest: Longest) -> str:
    least = min(found, key=lambda size: found[size].peak_bytes)
    is_of_evaluation = found[least].peak_phase == "evaluation"
    remedies = advice_on_evaluation(trainer) if is_of_evaluation else advice(trainer, longest.rows)
    return (
        f"sequence_chunk_size: got 'auto', but no size fits {format_bytes(budget)} with {longest.rows} row{'s' * (longest.rows != 1)} of up to "
        f"{longest.tokens} tokens: chunks of {least} are predicted to need {format_bytes(found[least].peak_bytes)} in {found[least].peak_phase.replace('_', ' ')}. "
        f"Try, one at a time: {'; '.join(remedies)}."
    )


def _tell(trainer, shape: BatchShape, chosen: int, peaks: dict[int, int], budget: int, seconds: dict[int, float]) -> None:
    if not trainer.is_world_process_zero():
        return
    tried = ", ".join(
        f"{size} {format_bytes(peak)}" + (f" {seconds[size]:.3g} s" if seconds.get(size) else "") + (" (too much)" if peak > budget else "")
        for size, peak in peaks.items()
    )
    message = f"sequence_chunk_size=auto: {chosen}, of rows up to {shape.tokens} tokens and {format_bytes(budget)}. Tokens, predicted peak, time: {tried}."
    if trainer.args.disable_tqdm:
        logger.info(message)
    else:
        print(message, file=sys.stderr, flush=True)
