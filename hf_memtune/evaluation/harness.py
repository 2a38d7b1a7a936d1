"""Scores of a model in memory on tasks of lm-eval (EleutherAI's evaluation harness), by lm-eval's own HFLM and simple_evaluate."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from hf_memtune.evaluation.harness_tasks import Tasks, silenced
from hf_memtune.files import write_text
from hf_memtune.methods.overrides import instance_attribute, modes_kept

BOOTSTRAP_ITERS = 1000  # resamplings for the standard errors of metrics that are no means; 0 would leave out all of them
BATCH_SIZE = 8
# They warn that a model in memory is one process's, and that num_fewshot was set: as is wanted here.
_TALKING = ("lm_eval.models.huggingface", "lm_eval.evaluator")
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


class Score(NamedTuple):
    """One metric of one task or group. filter: of the answers, "none" for none. stderr: standard error, None where there is none."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None

    @property
    def name(self) -> str:
        return self.metric if self.filter == "none" else f"{self.metric}_{self.filter}"


def score(model, tokenizer, tasks: Tasks, batch_size: int = BATCH_SIZE, limit: int | None = None) -> dict[str, Any] | None:
    """What lm-eval's simple_evaluate returns, without samples; see `scores_of`.

    model: a causal language model of transformers, a PEFT model, or one with reversible layers, where it is. Every module of it is left
    in the mode, training or evaluation, in which it was, and its weights are as they were, tied or not; so is the tokenizer. limit: rows
    of each task, the first ones; None: all.
    The generators of random numbers are seeded by lm-eval. Among several processes every one scores all rows, and all but the first
    one of a machine get None.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with modes_kept(model), instance_attribute(model, "tie_weights", _left_alone), silenced(*_TALKING):
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=_with_padding(tokenizer), batch_size=batch_size),
            tasks=tasks.items,
            task_manager=tasks.manager,
            num_fewshot=tasks.num_fewshot,
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )


def scores_of(results: dict[str, Any]) -> list[Score]:
    """Every metric of every task and group."""
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or metric in _NOT_METRICS or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            found.append(Score(task, metric, kind, float(value), float(error) if isinstance(error, (int, float)) else None))
    return found


def logged(scores: list[Score], by_task: bool = True) -> dict[str, float]:
    """Scores as a Trainer logs them: `eval_sciq_acc`, and its standard error as `eval_sciq_acc_stderr`. by_task: with the task's name."""
    found = {}
    for each in scores:
        name = f"eval_{each.task}_{each.name}" if by_task else f"eval_{each.name}"
        found[name] = each.value
        if each.stderr is not None:
            found[f"{name}_stderr"] = each.stderr
    return found


def table_of(results: dict[str, Any]) -> str:
    """lm-eval's own table, in Markdown; groups in a second one."""
    from lm_eval.utils import make_table

    return make_table(results) + (f"\n{make_table(results, 'groups')}" if results.get("groups") else "")


def write_results(results: dict[str, Any], path: str | Path) -> Path:
    """All that lm-eval returned, as the JSON that its own command writes. Returns the path."""
    from lm_eval.utils import handle_non_serializable

    return write_text(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def _left_alone() -> None:
    """In place of tying weights, which lm-eval asks for: a head whose weights are its own, whatever the config says, would lose them, in the middle
    of training too."""


def _with_padding(tokenizer):
    """The tokenizer, or a copy of one without a token for padding: lm-eval gives it one, which would be saved with the model."""
    return tokenizer if tokenizer.pad_token_id is not None else copy.deepcopy(tokenizer)
