"""What the methods do on every architecture of the installed transformers: `python scripts/coverage.py`.

A tiny random model of every type (see tiny.py) takes one step plainly and one under each method, on rows without padding, padded on the
right, and padded on the left; the gradients of all parameters are compared, in float64 where the model runs in it. Writes
results/coverage.jsonl, one line a type: exact (with the largest difference, relative to the whole gradient), refused (with the reason),
wrong, crashed, or not built.

    python scripts/coverage.py --kinds causal --types llama qwen3_next
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from options import parse, some_of
from store import measure
from tiny import KINDS, batch_of, tiny, types
from torch import Tensor, nn

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, checkpoint_in_two_levels
from hf_memtune.errors import MemTuneError

CHUNK = 7
ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-3}  # parts of many models compute in float32 whatever they are given
PADDINGS = (None, "right", "left")
Method = Callable[[nn.Module], AbstractContextManager]


@contextmanager
def _in_two_levels(model: nn.Module) -> Iterator[None]:
    handle = checkpoint_in_two_levels(model)
    try:
        yield
    finally:
        handle.restore()


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    if not model.supports_gradient_checkpointing:
        raise MemTuneError(f"{type(model).__name__} has no activation checkpointing.")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


METHODS: dict[str, Method] = {
    "streaming": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK)),
    "by_layers": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK, stream_order="layers")),
    "seeking_cut": lambda model: TokenSeeking(model, _all_tokens(token_gradient="cut")),
    "seeking_stream": lambda model: TokenSeeking(model, _all_tokens(token_gradient="stream", sequence_chunk_size=CHUNK)),
    "two_levels": _in_two_levels,
    "checkpointing": _checkpointed,  # transformers' own, which refusals name as what to do instead
}


def _all_tokens(**settings: Any) -> TokenSeekingConfig:
    """Every token is kept, through the passes that keep some: any difference is the passes' own."""
    return TokenSeekingConfig(
        token_seeking=True, token_ratio=1 - 1e-9, token_selection="top", select_from="all", context_chunk_size=CHUNK, **settings
    )


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "coverage", given, kinds=some_of(KINDS), types={"nargs": "+", "help": "types of config"})
    if unknown := set(options.types or ()) - {name for kind in options.kinds for name in types(kind)}:
        sys.exit(
            f"--types: got {', '.join(sorted(unknown))}, expected types of config that transformers has for {', '.join(options.kinds)}."
        )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    wanted = [{"kind": kind, "type": name} for kind in options.kinds for name in types(kind) if name in (options.types or [name])]
    measure(options.out, wanted, lambda run: measured(run["kind"], run["type"]), "Architectures", outcomes)


def outcomes(row: dict) -> str:
    found = row.get("not_built") or "  ".join(f"{method}: {row[method]['outcome']}" for method in METHODS)
    return f"{row['kind']:8} {row['type']:28} {found}"


def measured(kind: str, name: str) -> dict[str, Any]:
    """One line of the file."""
    row: dict[str, Any] = {"kind": kind, "type": name}
    try:
        model, dtype = _model(kind, name)
    except Exception as error:
        return row | {"not_built": _said(error)}
    row |= {"model": type(model).__name__, "dtype": str(dtype).removeprefix("torch.")}
    batches = {padding: batch_of(model, kind, padding) for padding in PADDINGS}
    plain = {padding: _attempt(model, batch) for padding, batch in batches.items()}
    batches = {padding: batch for padding, batch in batches.items() if isinstance(plain[padding], dict)}
    row["paddings"] = [padding or "none" for padding in batches]
    row["followed"] = _followed(model)
    for method, make in METHODS.items():
        row[method] = _outcome(partial(_under, make, model), batches, plain, ALLOWED[dtype])
    return row


def _followed(model: nn.Module) -> str:
    """How a stream gets at what layers know of earlier tokens."""
    try:
        with Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK)) as streaming:
            cache = streaming.router.cache
    except MemTuneError:
        return "not"
    ways = [
        ("states", cache and cache.has_states),
        ("keys to choose by", cache and cache.has_indices),
        ("attention by hand", cache and cache.by_hand),
    ]
    return ", ".join(name for name, there in ways if there) or "attention"


def _model(kind: str, name: str) -> tuple[nn.Module, torch.dtype]:
    """In float64, or in float32 where the model's own step does not run in it."""
    for dtype in (torch.float64, torch.float32):
        model = tiny(name, kind, dtype)
        found = _attempt(model, batch_of(model, kind))
        if isinstance(found, dict):
            return model, dtype
    raise found


def _attempt(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor] | Exception:
    try:
        return _gradients(model, batch)
    except Exception as error:
        return error


def _gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if not all(bool(gradient.isfinite().all()) for gradient in found.values()):
        raise ArithmeticError("gradients are not finite")
    return found


def _under(make: Method, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with make(model):
        return _gradients(model, batch)


def _outcome(step: Callable, batches: dict, plain: dict, allowed: float) -> dict[str, Any]:
    worst = 0.0
    for padding, batch in batches.items():
        try:
            found = step(batch)
        except MemTuneError as error:
            return {"outcome": "refused", "padding": padding, "reason": _said(error)}
        except Exception as error:
            return {"outcome": "crashed", "padding": padding, "reason": f"{type(error).__name__}: {_said(error)}"}
        difference = _difference(found, plain[padding])
        worst = max(worst, difference)
        if not difference <= allowed:
            return {"outcome": "wrong", "padding": padding, "difference": str(difference)}
    return {"outcome": "exact", "difference": float(f"{worst:.1e}")}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any parameter, the difference relative to its own gradient or to a thousandth of the largest one, whichever is more."""
    largest = max((g.double().norm().item() for g in expected.values()), default=0.0)
    names = found.keys() | expected.keys()
    pairs = [(found.get(name), expected.get(name)) for name in names]
    pairs = [(torch.zeros_like(e) if f is None else f, torch.zeros_like(f) if e is None else e) for f, e in pairs]
    return max(((f - e).double().norm().item() / max(e.double().norm().item(), 1e-3 * largest, 1e-12) for f, e in pairs), default=0.0)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:900]


if __name__ == "__main__":
    main()
