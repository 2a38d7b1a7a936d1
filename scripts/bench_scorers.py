"""What each score keeps of real rows: `python scripts/bench_scorers.py`. Writes results/scorers.jsonl, a line for each scorer.

The highest scores of the pre-trained model before its first step, prompts masked out, chosen among all tokens: how many of the kept tokens stand
where, in the prompt or in the answer, of which kind they are, and how far two scorers keep the same ones. As `hf-memtune tokens --compare` counts.

    make assets NAMES="smollm2 alpaca"
"""

import os
from pathlib import Path

from options import one, parse
from store import append, missing

SCORERS = ("random", "context", "gradient", "combined", "loss", "softmax_residual", "true_gradient")


def main(given: list[str] | None = None) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options = parse(
        __doc__, "scorers", given, task=one("smollm2-alpaca", "one of scripts/learning/tasks.py whose loss is one of tokens"),
        rows=one(100, "rows that are looked at"), ratio=one(0.3, "share of a row's tokens that is kept"), assets=one(Path(".assets")),
    )  # fmt: skip
    wanted = [{"task": options.task, "rows": options.rows, "ratio": options.ratio, "scorer": scorer} for scorer in SCORERS]
    if not missing(options.out, wanted):
        return
    from conditions import conditions
    from learning.tasks import TASKS, Task
    from transformers import set_seed

    from hf_memtune import TokenSeekingConfig
    from hf_memtune.training.scorer_comparison import compare_scorers

    set_seed(0)
    task = Task(TASKS[options.task], options.assets, held_out_rows=1)
    batches = (batch for batch, _ in zip(task.batches(1, seed=0), range(options.rows)))
    config = TokenSeekingConfig(token_seeking=True, token_ratio=options.ratio, token_selection="top", select_from="all")
    shares, _ = compare_scorers(task.fresh_model(), batches, config, SCORERS, task.tokenizer)
    found, met = shares.to_dict(), conditions(**task.settings.described, device="cpu", token_selection="top", select_from="all")
    for run in wanted:
        scorer = run["scorer"]
        told = {"kept": found["tokens"][scorer], "of": found["tokens"]["all tokens"], "overlap": found["overlap"][scorer]}
        told["shares"] = {kind: {who: by[who] for who in (scorer, "all tokens")} for kind, by in found["shares"].items()}
        append(options.out, run | told | {"conditions": met})
        answer = next(iter(found["shares"]["role"][scorer].values()))
        print(f"{scorer:17} {told['kept']:7.0f} tokens kept, {answer:.1%} of them with a label", flush=True)


if __name__ == "__main__":
    main()
