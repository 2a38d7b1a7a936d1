"""How far the gradient of each way to choose tokens is from that of all tokens: `python scripts/bench_gradient.py`.

Real rows, a pre-trained model before its first step. For every batch the gradient of all labelled tokens is compared with that of an arm:
its relative error, its cosine, and how many tokens ran with gradient. The cosine of the sums over all batches tells noise, which
averages out, from bias, which stays. Writes results/gradient.jsonl, one line an arm with its conditions.

    make assets NAMES="smollm2 alpaca"
"""

import argparse
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from conditions import conditions
from store import append

SELECTIONS = {
    "random, top, cut": {"token_scorer": "random", "token_selection": "top", "token_gradient": "cut"},
    "random, top, stream": {"token_scorer": "random", "token_selection": "top", "token_gradient": "stream"},
    "random, sample, cut": {"token_scorer": "random", "token_selection": "sample", "token_gradient": "cut"},
    "random, sample, stream": {"token_scorer": "random", "token_selection": "sample", "token_gradient": "stream"},
    "combined, top, cut": {"token_scorer": "combined", "token_selection": "top", "token_gradient": "cut"},
    "combined, top, stream": {"token_scorer": "combined", "token_selection": "top", "token_gradient": "stream"},
    "combined, sample, stream": {"token_scorer": "combined", "token_selection": "sample", "token_gradient": "stream"},
    "loss, sample, stream": {"token_scorer": "loss", "token_selection": "sample", "token_gradient": "stream"},
}
THRESHOLDS = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)


@dataclass
class Measured:
    """One arm over all batches. sums: of its gradients, and of those of all tokens."""

    errors: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    sums: tuple | None = None

    def add(self, found: torch.Tensor, exact: torch.Tensor, share: float) -> None:
        self.errors.append(float((found - exact).norm() / exact.norm()))
        self.cosines.append(float(torch.cosine_similarity(found, exact, dim=0)))
        self.shares.append(share)
        self.sums = (found, exact) if self.sums is None else (self.sums[0] + found, self.sums[1] + exact)

    def described(self) -> dict:
        together = float(torch.cosine_similarity(*self.sums, dim=0))
        return {
            "error": round(median(self.errors), 4),
            "cosine": round(median(self.cosines), 4),
            "cosine_of_sums": round(together, 4),
            "tokens_with_gradient": round(sum(self.shares) / len(self.shares), 4),
        }


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is local; must be set before transformers is imported
    options = _options()
    from quality.tasks import Task
    from transformers import set_seed

    set_seed(0)
    task = Task(options.task, options.assets, held_out_rows=1)
    model = _without_dropout(task.fresh_model())
    batches = [batch for batch, _ in zip(task.batches(options.rows, seed=0), range(options.batches))]
    exact = [_gradient(model, batch) for batch in _tracked(batches, "all tokens")]
    for name, settings in _arms(options.chunk):
        _write(options, task, name, settings, _measured(model, batches, exact, name, settings))
    return 0


def _without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """In training mode, in which methods act, but so that nothing but the choice of tokens differs."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return model


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="smollm2-alpaca", help="one of scripts/quality/tasks.py whose loss is one of tokens")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=16, help="tokens of a chunk of skip; the rows are short")
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--out", type=Path, default=Path("results/gradient.jsonl"))
    return parser.parse_args()


def _arms(chunk: int):
    """Ways to choose a tenth of the labelled tokens; then all of them, with more and more of the others left out of backward."""
    for name, settings in SELECTIONS.items():
        yield name, {**settings, "token_ratio": 0.1, "select_from": "labels"}
    yield "combined, top, cut, any token", {**SELECTIONS["combined, top, cut"], "token_ratio": 0.1, "select_from": "all"}
    for threshold in THRESHOLDS:
        skipping = {"token_gradient": "skip", "skip_threshold": threshold, "sequence_chunk_size": chunk}
        every = {"token_scorer": "random", "token_selection": "top", "token_ratio": 1.0, "select_from": "labels", "always_keep": "none"}
        yield f"every label, skip below {threshold:g}", {**every, **skipping}
    yield "every label, cut", {**every, "token_gradient": "cut", "token_ratio": 0.999}  # of all tokens, and prompts take more than 0.1 %


def _measured(model, batches, exact, name: str, settings: dict) -> Measured:
    from quality.counting import Counts

    from hf_memtune import TokenSeeking, TokenSeekingConfig

    measured = Measured()
    with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings)) as seeking:
        for batch, expected in zip(_tracked(batches, name), exact):
            counts = Counts()
            forget = seeking.listeners.add(counts)
            measured.add(_gradient(model, batch), expected, counts.share_with_gradient)
            forget()
    return measured


def _gradient(model, batch: dict) -> torch.Tensor:
    """All gradients in one float32 vector."""
    model(**batch, use_cache=False).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.float().flatten().cpu() for p in trained])
    model.zero_grad(set_to_none=True)
    return flat


def _tracked(batches, name: str):
    from rich.progress import track

    return track(batches, description=name, disable=not sys.stderr.isatty())


def _write(options, task, name: str, settings: dict, measured: Measured) -> None:
    described = conditions(**task.settings.described, rows=options.rows, batches=options.batches, device="cpu")
    row = {"task": options.task, "arm": name, **measured.described(), "settings": settings, "conditions": described}
    append(options.out, row)
    print(
        f"{name:34} error {row['error']:.3f}  cosine {row['cosine']:.3f}  of sums {row['cosine_of_sums']:.3f}  tokens {row['tokens_with_gradient']:.1%}",
        flush=True,
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
