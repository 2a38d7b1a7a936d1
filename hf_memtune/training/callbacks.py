"""Callbacks: install a strategy for the time of training, log memory, draw what was kept."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_memtune.settings.methods import StreamingConfig, TokenSeekingConfig
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.errors import ConfigError
from hf_memtune.memory import LiveBytes, peak_device_bytes, reset_peak_device_bytes, resident_bytes
from hf_memtune.methods.streaming.streaming import Streaming
from hf_memtune.methods.seeking.token_seeking import TokenSeeking
from hf_memtune.training.offline import OfflineScores
from hf_memtune.training.rng import preserved_rng


class StreamingCallback(TrainerCallback):
    """Installs exact streaming at the start of training and removes it at its end. `strategy` is what is installed, or None."""

    def __init__(self, config: StreamingConfig):
        self.config = config
        self.strategy: Streaming | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove()  # training begins again where a batch size that did not fit was halved
        self.strategy = Streaming(model, self.config)

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def remove(self) -> None:
        """Take the strategy off the model. May be called twice."""
        if self.strategy is not None:
            self.strategy.remove()
        self.strategy = None


class TokenSeekingCallback(TrainerCallback, ExportableState):
    """Installs token seeking at the start of training and removes it at its end.

    `strategy` is what is installed, or None. MemEfficientTrainer adds this callback by itself, uses what it installs, and
    removes it when training fails. Under another Trainer it changes nothing until that Trainer opens `strategy.step`.
    trainer: needed for seek_schedule "epoch" and "once" alone, whose passes over the data set go through its data loader.
    """

    def __init__(self, config: TokenSeekingConfig, scorer: TokenScorer | None = None, trainer=None):
        if config.seek_schedule != "step" and trainer is None:
            raise ConfigError([f"seek_schedule: got {config.seek_schedule!r} without a trainer, whose data it passes over."])
        self.config, self.scorer, self.trainer = config, scorer, trainer
        self.strategy: TokenSeeking | None = None
        self.offline: OfflineScores | None = None
        self._resumed_file: Path | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove()  # training begins again where a batch size that did not fit was halved
        self.strategy = TokenSeeking(model, self.config, self.scorer)
        self._resumed_file = _scores_file(state) if state.global_step else None
        if self.config.seek_schedule == "once":
            self.offline = OfflineScores(self.strategy, self.trainer)
            self.offline.load_or_score() if self._resumed_file is None else self.offline.resume(self._resumed_file)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.config.seek_schedule == "epoch":
            file, self._resumed_file = self._resumed_file, None
            self.offline = OfflineScores(self.strategy, self.trainer)
            if file is not None and state.epoch % 1:  # in the middle of an epoch: its scores are those of its beginning
                self.offline.resume(file)
            else:
                self.offline.score_into(Path(args.output_dir) / f"seek-epoch-{round(state.epoch or 0)}.safetensors")

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def remove(self) -> None:
        """Take the strategy off the model. May be called twice."""
        if self.strategy is not None:
            self.strategy.remove()
        self.strategy = self.offline = None

    def offline_scores(self, inputs: dict[str, Any]) -> dict[str, Tensor] | None:
        """Scores computed earlier for the rows of a batch, by stack, (B, T) each; None where the step scores by itself."""
        return None if self.offline is None else self.offline.lookup(inputs)

    def state(self) -> dict:
        """Saved with a checkpoint: a resumed run must use the scores of the pre-trained model, not make new ones."""
        file = None if self.offline is None or self.offline.file is None else str(self.offline.file)
        return {"args": {}, "attributes": {"scores_file": file}}


def _scores_file(state) -> Path | None:
    """The file of scores that a checkpoint names."""
    saved = state.stateful_callbacks.get(TokenSeekingCallback.__name__, {})
    file = (saved[0] if isinstance(saved, list) else saved).get("attributes", {}).get("scores_file")
    return None if file is None else Path(file)


class MemoryCallback(TrainerCallback):
    """Measures memory and time of training, for the logs.

    peak_memory_bytes: on a GPU, the allocator's peak since the last log; on a CPU, the peak of live bytes traced in one step of
    `trace_steps` but those `left_out` (storages that are older than the step, such as weights, are not in it). resident_bytes: the process.
    step_seconds: mean of an optimizer step. tokens_seen, tokens_kept, tokens_learned, the kept ones that carry a label (where
    the loss is one of tokens), and tokens_recomputed, those that ran with gradient in a stream: since the last log, of this process.
    """

    def __init__(self, trace_steps: int = 50):
        self.trace_steps, self.left_out = trace_steps, set()
        self._tracer: LiveBytes | None = None
        self._traced_bytes: int | None = None
        self._began = 0.0
        self._device = torch.device("cpu")
        self._restart()

    def _restart(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._tokens: dict[str, Tensor | int] = {}

    def count_tokens(self, **counts: Tensor | int) -> None:
        """Add a step's counts (seen, kept, learned, recomputed); those on a device stay there until the next log."""
        for name, count in counts.items():
            self._tokens[name] = self._tokens.get(name, 0) + count

    def on_train_begin(self, args, state, control, **kwargs):
        self.close()
        self._restart()
        self._device = args.device
        reset_peak_device_bytes(args.device)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()
        on_device = args.device.type not in ("cpu", "mps")
        if state.global_step in self.left_out:
            return
        if not on_device and self.trace_steps and state.global_step % self.trace_steps == min(1, self.trace_steps - 1):
            self._tracer = LiveBytes()
            self._tracer.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)  # or the launches would be timed, not the work
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self.close()

    def close(self) -> None:
        """End a trace that is still open (training failed in the middle of a step). May be called twice."""
        if self._tracer is not None:
            tracer, self._tracer = self._tracer, None
            tracer.__exit__(None, None, None)
            self._traced_bytes = tracer.peak_bytes

    def since_last_log(self) -> dict[str, float]:
        """Measurements since the last call, for the logs."""
        peak = peak_device_bytes(self._device)
        found = {"peak_memory_bytes": peak if peak is not None else self._traced_bytes, "resident_bytes": resident_bytes()}
        if self._steps:
            found["step_seconds"] = self._seconds / self._steps
        found |= {f"tokens_{name}": int(count) for name, count in self._tokens.items()}
        reset_peak_device_bytes(self._device)
        self._restart()
        return {name: value for name, value in found.items() if value is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        # MemEfficientTrainer puts them into the logs before they are sent anywhere; under a plain Trainer this is in time
        # for the callbacks that come after this one, and for the history
        if logs is not None and "loss" in logs and "step_seconds" not in logs:
            found = self.since_last_log()
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)


class TokenMapCallback(TrainerCallback):
    """Draws which tokens of chosen examples are scored how and kept, every `every_n_steps` optimizer steps.

    examples: tokenised rows (dicts of input_ids, labels, ...), collated by `collator`. scorer: as given to the trainer, if a
    function was. Files go to `folder` (default: output_dir/token_maps), one HTML page a drawing. Scores come from the model as
    it is at that step. The trainer needs a tokenizer (processing_class). Drawing does not change what training draws at random.
    """

    def __init__(
        self,
        examples,
        collator,
        config: TokenSeekingConfig,
        every_n_steps: int = 100,
        folder: str | None = None,
        scorer: TokenScorer | None = None,
    ):
        self.examples, self.collator, self.config, self.scorer = list(examples), collator, config, scorer
        self.every_n_steps, self.folder = every_n_steps, folder
        if every_n_steps < 1 or not self.examples:
            raise ConfigError([f"TokenMapCallback: got every_n_steps={every_n_steps} and {len(self.examples)} examples, expected 1 or more."])

    def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
        if processing_class is None:
            raise ConfigError(["TokenMapCallback: the trainer has no tokenizer. Pass processing_class=tokenizer."])
        self._draw(args, state, processing_class=processing_class, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_n_steps == 0:
            self._draw(args, state, **kwargs)

    def _draw(self, args, state, model=None, processing_class=None, **kwargs):
        if not state.is_world_process_zero:
            return
        from hf_memtune.training.token_maps import token_maps
        from hf_memtune.visualization import write_token_map_html

        folder = Path(self.folder or Path(args.output_dir) / "token_maps")
        folder.mkdir(parents=True, exist_ok=True)
        with preserved_rng(args.device):
            batch = {k: v.to(args.device) for k, v in self.collator(self.examples).items() if torch.is_tensor(v)}
            maps = token_maps(model, batch, self.config, processing_class, self.scorer)
        write_token_map_html(maps, folder / f"step-{state.global_step:06d}.html", {"step": state.global_step})
