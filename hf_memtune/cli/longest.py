"""`hf-memtune longest --model M --gpu rtx4090 [flags of train]`: the longest row, and the largest batch, that fit.

    hf-memtune longest --model Llama-3.1-8B --gpu rtx4090 --dtype bfloat16 --lora_r 16 --activation_checkpointing --sequence_chunk_size 512

Every answer is an estimate of its own. One step beyond it does not fit: an estimate says so, or the line through two of them, below which
no longer row lies.
"""

import json
from typing import Any

from hf_memtune.cli import forecast
from hf_memtune.cli.budget import RoomArguments
from hf_memtune.errors import ConfigError

MOST_ROWS = 1024


class _Needed(RoomArguments):
    """The memory there is, which this command has to know."""

    def problems(self) -> list[str]:
        missing = self.memory_budget is None and self.gpu is None
        return super().problems() + (["memory_budget: got nothing, expected --budget 24GiB, or --gpu rtx4090."] if missing else [])


def run(arguments: list[str]) -> None:
    """Print both answers. Raises ConfigError with all problems of the settings, and where not even the shortest row fits."""
    from hf_memtune.cli.verdict import remedy
    from hf_memtune.forecast.longest import largest, longest_row

    settings = forecast.parse(arguments, make_parser(), _Needed, as_given=True)
    room, blanks = settings.more.room, forecast.Blanks()
    rows = settings.training.per_device_train_batch_size if "per_device_train_batch_size" in settings.given else 1
    traced = Traced(settings, blanks, "tokens", rows=rows)
    longest = longest_row(traced, room.tensor_bytes, settings.training.stream_chunk_size, _positions(settings))
    at_most = traced.estimates[longest.size or min(traced.estimates)]
    if not longest.size:
        raise ConfigError([_nothing(settings, traced, remedy(at_most, room, forecast.run_of(settings)))])
    batch = largest(Traced(settings, blanks, "rows", tokens=settings.tokens), room.tensor_bytes, 1, MOST_ROWS)
    if settings.what.json:
        print(json.dumps({"budget_bytes": room.tensor_bytes, "rows": rows, "row": longest._asdict(), "batch": batch._asdict()}))
        return
    limited = {"rows": longest.bytes_beyond is not None, "batches": batch.bytes_beyond is not None}
    larger = "both" if all(limited.values()) else next((name for name, by_memory in limited.items() if by_memory), None)
    following = _next(settings, at_most, larger) if larger else "nothing: memory limits neither"
    print("\n".join([*_said(settings, longest, batch, rows), f"next: {following}."]))


def make_parser():
    """The parser of this command: that of train, with what memory there is before it."""
    return forecast.make_parser("longest", RoomArguments)


class Traced:
    """Peak bytes by one size, each said on standard error as it is found. estimates: what was found, by size."""

    def __init__(self, settings, blanks, name: str, **fixed: int):
        from rich.console import Console

        self.estimates: dict[int, Any] = {}
        self._settings, self._blanks, self._name, self._fixed, self._console = settings, blanks, name, fixed, Console(stderr=True)

    def __call__(self, size: int) -> int:
        with self._console.status(f"tracing {_counted(size, self._name)}"):
            found = forecast.predict(self._settings, **{self._name: size} | self._fixed, blanks=self._blanks)
        self.estimates[size] = found
        self._console.print(f"  {_counted(size, self._name)}: {_gib(found.peak_bytes)}", style="dim", highlight=False)
        return found.peak_bytes


def _positions(settings) -> int:
    from hf_memtune.cli.blank import read_config

    config = read_config(settings.model.model_name_or_path, settings.what.config_overrides).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**24


def _said(settings, longest, batch, rows: int) -> list[str]:
    room = settings.more.room
    lines = [f"budget: {_gib(room.tensor_bytes)} of tensors ({room.source}). Predicted, not measured."]
    beyond = (
        "the model has no positions for more"
        if longest.bytes_beyond is None
        else f"a step more needs at least {_gib(longest.bytes_beyond)}"
    )
    each = f"{_counted(rows, 'rows')} a micro-batch"
    lines.append(f"longest row, {each}: {longest.size} tokens ({_gib(longest.bytes)}; {beyond}).")
    if not batch.size:
        return [*lines, f"largest batch: not even one row of {settings.tokens} tokens fits."]
    beyond = f"the search ends at {MOST_ROWS}" if batch.bytes_beyond is None else f"one more needs at least {_gib(batch.bytes_beyond)}"
    return [*lines, f"largest batch: {_counted(batch.size, 'rows')} of {settings.tokens} tokens ({_gib(batch.bytes)}; {beyond})."]


def _next(settings, found, larger: str) -> str:
    """What to change. found: the estimate of the longest row. larger: what memory limits, both, rows or batches."""
    from hf_memtune.cli.verdict import less_evaluation
    from hf_memtune.levers.table import least_offers

    if found.peak_phase == "evaluation" and larger != "batches":
        return f"{less_evaluation(found)} makes rows longer"
    offers = least_offers(forecast.run_of(settings))
    offers = [offer for offer in offers if "per_device_train_batch_size" not in offer.changes]  # which is searched for here
    return f"{offers[0]} makes {larger} larger" if offers else "a smaller model, or more memory"


def _counted(size: int, name: str) -> str:
    """1 row, 2 rows."""
    return f"{size} {name if size != 1 else name.removesuffix('s')}"


def _gib(n_bytes: int) -> str:
    """Finer than is said elsewhere: what fits and what does not differ by little."""
    return f"{n_bytes / 2**30:,.3f} GiB"


def _nothing(settings, traced: Traced, following: str) -> str:
    more = settings.more
    got = "budget: got" if more.gpu is None else f"gpu: got {more.gpu}, which leaves"
    shortest = min(traced.estimates)
    needed = f"a row of {_counted(shortest, 'tokens')} already needs {_gib(traced.estimates[shortest].peak_bytes)}"
    return (
        f"{got} {_gib(more.room.tensor_bytes)} of tensors, of which {needed}. Next: {following}. hf-memtune plan tries all ways in order."
    )
