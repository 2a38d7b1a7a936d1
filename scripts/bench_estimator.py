"""Bias and noise of the gradient of every way to choose tokens: `python scripts/bench_estimator.py`. Writes results/estimator.jsonl.

Real rows; the pre-trained model before its first step, and after plain training. For every batch g is the gradient of all labelled tokens,
and g', g'' those of an arm in two independent draws. Relative to |g|, over all batches:

    rms^2 = mean |g' - g|^2 / |g|^2        bias^2 = mean <g' - g, g'' - g> / |g|^2

The product of independent errors has no noise of its own in expectation, so that bias is what no average over draws takes away; where it is
smaller than its own scatter bias^2 may come out below 0, and bias is then given as 0. bias_squared is that mean as it came out,
bias_squared_error its standard error over the batches. What the file has already is not measured again.

    make assets NAMES="smollm2 alpaca"
"""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from learning.arms import EVERY_LABEL, settings_of
from learning.gradients import gradient, without_dropout
from options import one, parse, some_of
from store import measure, missing
from torch import Tensor, nn

BEGINNING, END = "beginning", "end"
DRAWN = ("random", "context", "combined", "gradient", "loss", "softmax_residual", "true_gradient")
SKIPPED = ("random", "true_gradient")  # of these it is told what chunks that are left out change
LABELLED = "labelled/cut"


def main(given: list[str] | None = None) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options = parse(
        __doc__, "estimator", given, task=one("smollm2-alpaca", "one of scripts/learning/tasks.py whose loss is one of tokens"),
        rows=one(4, "rows of a batch"), batches=one(16), steps=one(60, "of plain training before the end"),
        learning_rate=one(5e-4, "of plain training"), points=some_of((BEGINNING, END)), arms=some_of(every_arm()), assets=one(Path(".assets")),
    )  # fmt: skip
    from learning.tasks import TASKS, Task
    from transformers import set_seed

    set_seed(0)
    task = Task(TASKS[options.task], options.assets, held_out_rows=1)
    model, length = without_dropout(task.fresh_model()), task.settings.max_length
    described = {name: getattr(options, name) for name in ("rows", "batches", "steps", "learning_rate")}
    described |= {**task.settings.described, "device": "cpu"}
    for point in (BEGINNING, END):
        wanted = [{"task": options.task, "point": point, "arm": arm} for arm in options.arms if point in options.points]
        if not missing(options.out, wanted):
            continue
        if point == END:
            train(model, task.batches(options.rows, seed=0), options.steps, options.learning_rate)
        batches = [batch for batch, _ in zip(task.batches(options.rows, seed=1), range(options.batches))]
        exact = [gradient(model, batch) for batch in batches]
        measure(
            options.out, wanted, lambda run, pair=(batches, exact): measured(model, *pair, run["arm"], length), "Measuring", **described
        )


def every_arm() -> Iterator[str]:
    """Names as in scripts/learning/arms.py; those of the papers choose among all tokens, the others among labels."""
    for ratio, path in product(("10%", "30%"), ("cut", "stream")):
        yield from (f"{scorer}/{selection}/{path}/{ratio}/labels" for selection in ("sample", "top") for scorer in DRAWN)
        yield from (f"{scorer}/top/{path}/{ratio}" for scorer in ("random", "combined"))
    yield from (f"{scorer}/sample/skip/{ratio}/labels" for ratio in ("10%", "30%") for scorer in SKIPPED)
    yield LABELLED


def train(model: nn.Module, batches: Iterator[dict], steps: int, learning_rate: float) -> None:
    """Plain training, simpler than that of the learning benchmarks: a constant rate, torch's weight decay of 0.01, no warm-up, no clipping."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for batch, _ in zip(batches, range(steps)):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(model: nn.Module, batches: list[dict], exact: list[Tensor], arm: str, max_length: int) -> dict:
    """Of one arm, on rows of so many tokens."""
    from learning.quality import Counts

    from hf_memtune import TokenSeeking, TokenSeekingConfig

    settings = settings_of(EVERY_LABEL if arm == LABELLED else arm, max_length)
    is_one = arm == LABELLED or ("/top/" in arm and not arm.startswith("random"))  # the same each time: all of its error is bias
    squares, products, cosines, counts = [], [], [], Counts()
    with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings)) as seeking:
        forget = seeking.listeners.add(counts)
        for batch, g in zip(batches, exact):
            found = [gradient(model, batch) for _ in range(1 if is_one else 2)]
            errors, size = [each - g for each in found], float(g.square().sum())
            squares.append(mean(float(error.square().sum()) for error in errors) / size)
            products.append(float(errors[0] @ errors[-1]) / size)
            cosines.append(float(found[0] @ g / (found[0].norm() * g.norm())) if float(found[0].norm()) else 0.0)
        forget()
    kept = counts.by_name["kept"] / counts.by_name["seen"]
    result = {"rms": mean(squares) ** 0.5, "bias": max(0.0, mean(products)) ** 0.5, "cosine": mean(cosines), "kept": kept}
    result |= {"bias_squared": mean(products), "bias_squared_error": stdev(products) / len(products) ** 0.5 if products[1:] else None}
    return {name: value if value is None else round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    main()
