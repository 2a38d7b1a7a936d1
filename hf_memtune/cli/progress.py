"""The log lines of a training on the screen: bytes in MiB and GiB. The metrics themselves keep bytes."""

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_memtune.units import format_bytes


def readable(logs: dict) -> dict:
    """Logged values as people read them: `peak_memory_bytes: 153212` becomes `peak_memory: 150 KiB`."""
    return {
        name.removesuffix("_bytes"): format_bytes(value) if name.endswith("_bytes") and _is_number(value) else value
        for name, value in logs.items()
        if name != "total_flos"
    }


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Readable:
    """Hands a callback of transformers the readable form of what is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=None if logs is None else readable(logs), **kwargs)


class ReadableProgress(_Readable, ProgressCallback):
    """transformers' progress bar, with readable log lines."""


class ReadablePrinter(_Readable, PrinterCallback):
    """transformers' plain log lines (`--disable_tqdm`), readable."""


def make_readable(trainer) -> None:
    """Put the callbacks above in the place of transformers' own. Where a trainer has none of them, nothing changes."""
    for usual, ours in ((ProgressCallback, ReadableProgress), (PrinterCallback, ReadablePrinter)):
        if trainer.pop_callback(usual) is not None:
            trainer.add_callback(ours)
