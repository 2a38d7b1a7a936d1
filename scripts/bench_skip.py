"""What leaving chunks out of backward costs the gradient, and what it saves: `python scripts/bench_skip.py`. Writes results/skip.jsonl.

Real rows, a pre-trained model before its first step. For every batch the gradient of all labelled tokens is compared with that of an arm:
its relative error, its cosine, and how many tokens ran with gradient. The cosine of the sums over all batches tells noise, which
averages out, from bias, which stays.

    make assets NAMES="smollm2 alpaca"
"""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

import torch
from learning.gradients import gradient, without_dropout
from options import one, parse
from store import measure, missing
from torch import Tensor, nn

THRESHOLDS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)


def main(given: list[str] | None = None) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options = parse(
        __doc__, "skip", given, task=one("smollm2-alpaca", "one of scripts/learning/tasks.py whose loss is one of tokens"),
        rows=one(4, "rows of a batch"), batches=one(12), chunk=one(16, "tokens of a chunk of skip; the rows are short"),
        assets=one(Path(".assets")),
    )  # fmt: skip
    settings = dict(arms(options.chunk))
    wanted = missing(options.out, [{"task": options.task, "arm": name} for name in settings])
    if not wanted:
        return
    from learning.tasks import TASKS, Task
    from transformers import set_seed

    set_seed(0)
    task = Task(TASKS[options.task], options.assets, held_out_rows=1)
    model = without_dropout(task.fresh_model())
    batches = [batch for batch, _ in zip(task.batches(options.rows, seed=0), range(options.batches))]
    exact = [gradient(model, batch) for batch in batches]
    described = {**task.settings.described, "rows": options.rows, "batches": options.batches, "device": "cpu"}
    measure(options.out, wanted, lambda run: measured(model, batches, exact, settings[run["arm"]]), **described)


def arms(chunk: int) -> Iterator[tuple[str, dict]]:
    """All labelled tokens, with more and more of the others left out of backward."""
    every = {"token_scorer": "random", "token_selection": "top", "token_ratio": 1.0, "select_from": "labels", "always_keep": "none"}
    for threshold in THRESHOLDS:
        skipping = {"token_gradient": "skip", "skip_threshold": threshold, "sequence_chunk_size": chunk}
        yield f"every label, skip below {threshold:g}", {**every, **skipping}
    yield "every label, cut", {**every, "token_gradient": "cut", "token_ratio": 0.999}  # of all tokens, and prompts take more than 0.1 %


def measured(model: nn.Module, batches: list[dict], exact: list[Tensor], settings: dict) -> dict:
    """Over all batches; tokens_with_gradient: positions that ran with gradient (of a stream, or else the kept ones), of the tokens seen."""
    from learning.quality import Counts

    from hf_memtune import TokenSeeking, TokenSeekingConfig

    shares, errors, cosines, sums = [], [], [], [0.0, 0.0]
    with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings)) as seeking:
        for batch, expected in zip(batches, exact):
            counts = Counts()
            forget = seeking.listeners.add(counts)
            found = gradient(model, batch)
            forget()
            told = counts.by_name
            shares.append(told.get("recomputed", told["kept"]) / told["seen"])
            errors.append(float((found - expected).norm() / expected.norm()))
            cosines.append(float(torch.cosine_similarity(found, expected, dim=0)))
            sums = [sums[0] + found, sums[1] + expected]
    together = float(torch.cosine_similarity(*sums, dim=0))
    found = {"error": median(errors), "cosine": median(cosines), "cosine_of_sums": together, "tokens_with_gradient": mean(shares)}
    return {name: round(value, 4) for name, value in found.items()} | {"settings": settings}


if __name__ == "__main__":
    main()
