"""A callback that scores the model on tasks of lm-eval while it is trained."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState

from hf_memtune.errors import ConfigError
from hf_memtune.evaluation.harness import BATCH_SIZE, logged, score, scores_of
from hf_memtune.evaluation.harness_tasks import load_tasks
from hf_memtune.training.logged import LoggedCallback
from hf_memtune.training.rng import preserved_rng

logger = logging.getLogger(__name__)

SPREAD = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class LMEvalCallback(LoggedCallback):
    """Scores the model on tasks of lm-eval every `every_n_steps` optimizer steps, and puts the scores into the logs.

    tasks: names, as `hf-memtune evaluate --tasks` takes them; tasks_folder: of task files of one's own. num_fewshot: examples before
    each question (None: as the task says). limit: rows of each task, the first ones (None: all). batch_size: rows at a time.
    results: [(step, what lm-eval returned), ...].

    The trainer needs a tokenizer (processing_class). Scoring changes neither what training draws at random nor the mode of any module.
    The tasks are loaded here: raises ConfigError for what cannot work. With several processes each scores all rows.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        every_n_steps: int = 500,
        num_fewshot: int | None = None,
        limit: int | None = None,
        tasks_folder: str | Path | None = None,
        batch_size: int = BATCH_SIZE,
    ):
        self.every_n_steps, self.limit, self.batch_size = every_n_steps, limit, batch_size
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        numbers = {"every_n_steps": every_n_steps, "batch_size": batch_size, "limit": 1 if limit is None else limit}
        found = [f"LMEvalCallback: {name}: got {value}, expected 1 or more." for name, value in numbers.items() if value < 1]
        if num_fewshot is not None and num_fewshot < 0:
            found.append(f"LMEvalCallback: num_fewshot: got {num_fewshot}, expected 0 or more.")
        if not names:
            found.append("LMEvalCallback: tasks: got none, expected names of tasks of lm-eval, or of your task files.")
        if found:
            raise ConfigError(found)
        self.tasks = load_tasks(names, tasks_folder, num_fewshot)
        self.results: list[tuple[int, dict[str, Any]]] = []
        self._new: dict[str, float] = {}

    def on_train_begin(self, args, state, control, processing_class=None, **kwargs):
        if processing_class is None:
            raise ConfigError(["LMEvalCallback: the trainer has no tokenizer. Pass processing_class=tokenizer."])
        require_whole_model("LMEvalCallback")
        if state.global_step == 0 and state.max_steps < self.every_n_steps and state.is_world_process_zero:
            logger.warning(
                "LMEvalCallback: every_n_steps=%d: training ends at step %d, so there will be no scores. Set every_n_steps to %d or less.",
                self.every_n_steps, state.max_steps, state.max_steps,
            )  # fmt: skip

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % self.every_n_steps:
            return
        with preserved_rng(args.device):
            found = score(model, processing_class, self.tasks, self.batch_size, self.limit)
        if found is not None:
            self.results.append((state.global_step, found))
            self._new = logged(scores_of(found))
        control.should_log = True

    @property
    def has_news(self) -> bool:
        return bool(self._new)

    def since_last_log(self) -> dict[str, float]:
        """Scores that are in no log yet."""
        found, self._new = self._new, {}
        return found


def require_whole_model(who: str) -> None:
    """Raises ConfigError where no process has all of the model: lm-eval takes a model in memory for that of one process."""
    kind = AcceleratorState().distributed_type
    if kind in SPREAD:
        raise ConfigError(
            [
                f"{who}: got a model that is spread over processes ({kind.value}), which lm-eval cannot score in memory. Score what was saved, in "
                "one process: hf-memtune evaluate --model FOLDER --tasks NAME."
            ]
        )
