"""`hf-memtune longest --model M --gpu rtx4090 [flags of train]`: the longest row, and the largest batch, that fit.

    hf-memtune longest --model Llama-3.1-8B --gpu rtx4090 --dtype bfloat16 --lora_r 16 --activation_checkpointing --sequence_chunk_size 512

Every answer is an estimate of its own. One step beyond it does not fit: an estimate says so, or the line through two of them, below which
no longer row lies.
"""

import json

from hf_memtune.cli import forecast
from hf_memtune.cli.budget import RoomArguments
from hf_memtune.errors import ConfigError

UNIT = 64  # tokens; of streams, their chunk: a part of one needs as much as a whole
MOST_ROWS = 1024


class _Needed(RoomArguments):
    """The memory there is, which this command has to know."""

    def problems(self) -> list[str]:
        missing = self.memory_budget is None and self.gpu is None
        return super().problems() + (["memory_budget: got nothing, expected --budget 24GiB, or --gpu rtx4090."] if missing else [])


def run(arguments: list[str]) -> None:
    """Print both answers. Raises ConfigError with all problems of the settings, and where not even the shortest row fits."""
    settings = forecast.parse(arguments, make_parser(), _Needed)
    room, blanks = settings.more.room, forecast.Blanks()
    longest, rows = _longest_row(settings, blanks)
    batch = _largest_batch(settings, blanks)
    if not longest.size:
        raise ConfigError([_nothing(settings, longest)])
    if settings.what.json:
        print(json.dumps({"budget_bytes": room.tensor_bytes, "rows": rows, "row": longest._asdict(), "batch": batch._asdict()}))
        return
    print("\n".join([*_said(settings, longest, batch, rows), *_next(settings)]))


def make_parser():
    """The parser of this command: that of train, with what memory there is before it."""
    return forecast.make_parser("longest", RoomArguments)


def _longest_row(settings, blanks):
    """What was found, and the rows of a micro-batch it holds for."""
    from hf_memtune.forecast.longest import largest

    rows = settings.training.per_device_train_batch_size if "per_device_train_batch_size" in settings.given else 1
    unit = settings.training.stream_chunk_size or UNIT
    return largest(_traced(settings, blanks, "tokens", rows=rows), settings.more.room.tensor_bytes, unit, _positions(settings)), rows


def _largest_batch(settings, blanks):
    from hf_memtune.forecast.longest import largest

    return largest(_traced(settings, blanks, "rows", tokens=settings.tokens), settings.more.room.tensor_bytes, 1, MOST_ROWS)


def _traced(settings, blanks, name: str, **fixed):
    """Peak bytes by one size, each said on standard error as it is found."""
    from rich.console import Console

    console = Console(stderr=True)

    def peak(size: int) -> int:
        with console.status(f"tracing {_counted(size, name)}"):
            found = forecast.predict(settings, **{name: size} | fixed, blanks=blanks).peak_bytes
        console.print(f"  {_counted(size, name)}: {_gib(found)}", style="dim", highlight=False)
        return found

    return peak


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


def _next(settings) -> list[str]:
    from hf_memtune.levers.table import offers_of

    offers = [offer for offer in offers_of(forecast.run_of(settings), one_each=True) if offer.missing is None]
    return [f"next: {offers[0]} makes both larger." if offers else "next: a smaller model, or more memory."]


def _counted(size: int, name: str) -> str:
    """1 row, 2 rows."""
    return f"{size} {name if size != 1 else name.removesuffix('s')}"


def _gib(n_bytes: int) -> str:
    """Finer than is said elsewhere: what fits and what does not differ by little."""
    return f"{n_bytes / 2**30:,.3f} GiB"


def _nothing(settings, longest) -> str:
    room = _gib(settings.more.room.tensor_bytes)
    return (
        f"budget: got {room} of tensors, of which the shortest row already needs {_gib(longest.bytes_beyond or 0)}. "
        f"{_next(settings)[0].removeprefix('next: ')} hf-memtune plan tries all ways in order."
    )
