"""Callbacks: put a method on the model for the time of training, draw what was kept."""

import logging
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_memtune.core.scorers import TokenScorer
from hf_memtune.core.selection import Selection
from hf_memtune.errors import ConfigError
from hf_memtune.levers.table import lever_of
from hf_memtune.methods.events import Listener
from hf_memtune.methods.method import Method
from hf_memtune.methods.seeking.method import TokenSeeking, require_seeking
from hf_memtune.methods.streaming.method import Streaming
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.settings.streaming import StreamingConfig
from hf_memtune.training.care.chunk_choice import choose_chunk
from hf_memtune.training.launch import problems_of
from hf_memtune.training.offline import OfflineScores
from hf_memtune.training.restorable import Restorable
from hf_memtune.training.rng import preserved_rng
from hf_memtune.training.running import RunningTrainer

logger = logging.getLogger(__name__)


class MethodCallback(TrainerCallback, Listener, Restorable):
    """Puts a method on the model at the start of training and takes it off at its end; any Trainer trains with it, unchanged.

    method: what is on, or None. listeners: who is told of its calls. Where training fails, transformers tells no callback: call `remove`.
    """

    def __init__(self):
        self.method: Method | None = None
        self.listeners: list[Listener] = []

    _changes: tuple[str, ...] = ()  # attributes that a step changes

    def make(self, model) -> Method:
        """The method, on the model."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove()  # training begins again where a batch size that did not fit was halved
        if found := problems_of(args, lever_of(self.config.switch)):
            raise ConfigError(found)
        self.method = self.make(model)
        for listener in (self, *self.listeners):
            self.method.listeners.add(listener)
        if isinstance(self, ExportableState):  # of a checkpoint that was made without it transformers would find no place for its state
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def takes(self, inputs: Any) -> None:
        """The next call of the model is of this micro-batch, as the trainer was given it."""

    def keep(self) -> Callable[[], None]:
        return partial(vars(self).update, {name: vars(self)[name] for name in self._changes if name in vars(self)})

    def remove(self) -> None:
        """Take the method off the model. May be called twice."""
        if self.method is not None:
            self.method.remove()
        self.method = None


class StreamingCallback(MethodCallback, ExportableState):
    """Exact streaming in the time of training: `StreamingCallback(sequence_chunk_size=512)`, or with a StreamingConfig.

    trainer: a MemEfficientTrainer, needed for sequence_chunk_size "auto" alone: for its longest batch, and by its steps, a size is chosen before
    step 0, which stands in `config` from then on, in the trainer's arguments, and in checkpoints.
    """

    def __init__(self, config: StreamingConfig | None = None, trainer: RunningTrainer | None = None, **settings):
        super().__init__()
        self.config, self.trainer = StreamingConfig(**settings) if config is None else config, trainer
        if not self.config.streams:
            raise ConfigError(
                ["sequence_chunk_size: got None, expected the tokens of a chunk: StreamingCallback(sequence_chunk_size=512)."]
            )
        if self.config.chunk_is_open and trainer is None:
            raise ConfigError(
                [
                    "sequence_chunk_size: got 'auto', which MemEfficientTrainer chooses for its own steps. Expected a number here, such as 512."
                ]
            )

    def make(self, model) -> Streaming:
        return Streaming(model, self.config)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.config.chunk_is_open:
            size = _size_of_checkpoint(state) if state.global_step else None
            self._settle(choose_chunk(self.trainer, self.config) if size is None else size)
        super().on_train_begin(args, state, control, **kwargs)

    def _settle(self, size: int) -> None:
        """The size is chosen: for good, and for all who read the arguments."""
        self.config = StreamingConfig.of(self.config, sequence_chunk_size=size, chunk_budget=None)
        self.trainer.args.sequence_chunk_size, self.trainer.args.chunk_budget = size, None

    def state(self) -> dict:
        """Saved with a checkpoint: a resumed run has the same chunks, whatever its machine could do."""
        return {"args": {f.name: getattr(self.config, f.name) for f in fields(self.config)}, "attributes": {}}


class TokenSeekingCallback(MethodCallback, ExportableState):
    """Token seeking in the time of training: `TokenSeekingCallback(token_ratio=0.3)`, or with a TokenSeekingConfig.

    A checkpoint holds its settings, and where the scores lie that it was given.

    last_selection: the tokens that the last call of the model in training kept (a dict by stack for encoder-decoder models), or None.
    trainer: needed for seek_schedule "epoch" and "once" alone, whose passes over the data set go through its data loader.
    """

    def __init__(
        self, config: TokenSeekingConfig | None = None, scorer: TokenScorer | None = None, trainer: RunningTrainer | None = None, **settings
    ):
        super().__init__()
        self.config = TokenSeekingConfig(**{"token_seeking": True, **settings}) if config is None else config
        require_seeking(self.config)
        if self.config.seek_schedule != "step" and trainer is None:
            raise ConfigError([f"seek_schedule: got {self.config.seek_schedule!r} without a trainer, whose data it passes over."])
        if scorer is not None and not callable(scorer):
            raise ConfigError(
                [
                    f"scorer: got {scorer!r}, expected a function, which no checkpoint can hold. Give the callback to the resumed trainer, and "
                    "leave restore_callback_states_from_checkpoint out. Names go to token_scorer."
                ]
            )
        self.scorer, self.trainer = scorer, trainer
        self.offline: OfflineScores | None = None
        self.inputs: dict[str, Any] | None = None  # of the micro-batch, as the trainer was given them: a loss may take labels away
        self.last_selection: Selection | dict[str, Selection] | None = None
        self._resumed_file: Path | None = None
        self._learned: Tensor | int | None = None  # since the last log

    _changes = ("last_selection", "inputs", "_learned")

    def takes(self, inputs: Any) -> None:
        self.inputs = inputs if isinstance(inputs, dict) else None

    def make(self, model) -> TokenSeeking:
        return TokenSeeking(model, self.config, self.scorer)

    def counted(self, **counts: Tensor | int) -> None:
        if "learned" in counts:
            self._learned = counts["learned"] if self._learned is None else self._learned + counts["learned"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        learned, self._learned = self._learned, None
        if logs is not None and "loss" in logs and learned is not None and int(learned) == 0:
            if self.config.select_from == "labels":
                why = "no token of these rows had one. Look at what cuts rows (max_length), and at what the collator makes of labels."
            else:
                why = "the scorer chose prompt tokens alone. Set select_from=labels, or raise token_ratio."
            logger.warning("no kept token carried a label since the last log, so nothing was learned: %s", why)

    def chosen(self, selection):
        self.last_selection = selection if len(selection) > 1 else selection["decoder"]

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._resumed_file = _scores_file(state, [args.output_dir, self.config.seek_cache_dir]) if state.global_step else None
        if self.config.seek_schedule == "once":
            self._score_offline()
            self.offline.load_or_score() if self._resumed_file is None else self.offline.resume(self._resumed_file)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.config.seek_schedule == "epoch":
            file, self._resumed_file = self._resumed_file, None
            self._score_offline()
            if file is not None and state.epoch % 1:  # in the middle of an epoch: its scores are those of its beginning
                self.offline.resume(file)
            else:
                self.offline.score_into(Path(args.output_dir) / f"seek-epoch-{round(state.epoch or 0)}.safetensors")

    def _score_offline(self) -> None:
        self.offline = OfflineScores(self.method, self.trainer)
        self.method.lookup = self._offline_scores

    def _offline_scores(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Scores computed earlier for the rows of a call, by stack, (B, T) each; a loss may have taken their labels away."""
        return self.offline.lookup(self.inputs if _same_rows(self.inputs, inputs) else inputs)

    def remove(self) -> None:
        super().remove()
        self.offline = self.inputs = None

    def state(self) -> dict:
        """Saved with a checkpoint: a resumed run must use the scores of the pre-trained model, not make new ones."""
        file = None if self.offline is None or self.offline.file is None else str(self.offline.file)
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config) if getattr(self.config, f.name) is not None}
        scorer = {} if self.scorer is None else {"scorer": getattr(self.scorer, "__name__", type(self.scorer).__name__)}
        return {"args": settings | scorer, "attributes": {"scores_file": file}}


def _same_rows(batch: dict[str, Any] | None, inputs: dict[str, Any]) -> bool:
    """Whether a call is one of the rows of a micro-batch, and not another one that a loss makes beside it."""
    pair = [None if each is None else each.get("input_ids") for each in (batch, inputs)]
    return all(torch.is_tensor(ids) for ids in pair) and torch.equal(*(ids.cpu() for ids in pair))


def _saved(state, kind: type) -> dict[str, Any]:
    """What a checkpoint holds of a callback."""
    saved = state.stateful_callbacks.get(kind.__name__, {})
    return saved[0] if isinstance(saved, list) else saved


def _scores_file(state, folders: list[str | None]) -> Path | None:
    """The file of scores that a checkpoint names, or, where the folder of the run was moved, that of the same name in one of `folders`."""
    file = _saved(state, TokenSeekingCallback).get("attributes", {}).get("scores_file")
    if file is None:
        return None
    places = [Path(file), *(Path(folder) / Path(file).name for folder in folders if folder is not None)]
    return next((place for place in places if place.exists()), places[0])


def _size_of_checkpoint(state) -> int | None:
    """The tokens of a chunk with which a checkpoint was made."""
    size = _saved(state, StreamingCallback).get("args", {}).get("sequence_chunk_size")
    return size if isinstance(size, int) else None


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
            raise ConfigError(
                [f"TokenMapCallback: got every_n_steps={every_n_steps} and {len(self.examples)} examples, expected 1 or more."]
            )

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
        with preserved_rng(args.device, self.collator):
            batch = {k: v.to(args.device) for k, v in self.collator(self.examples).items() if torch.is_tensor(v)}
            maps = token_maps(model, batch, self.config, processing_class, self.scorer)
        write_token_map_html(maps, folder / f"step-{state.global_step:06d}.html", {"step": state.global_step})
