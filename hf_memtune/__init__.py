"""hf_memtune: fine-tune transformers in a fraction of the memory, by changing one word.

A *strategy* (exact streaming, token seeking) is applied to any transformers model through data about its *architecture*, driven by flat
settings, and seen through one memory *ledger*. Names below load when first used: importing this package changes nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "ConfigError": "errors",
    "MemTuneError": "errors",
    "StaleCacheError": "errors",
    "InverseError": "errors",
    "LogitsError": "errors",
    "StreamOverflowError": "errors",
    "TokenScoreError": "errors",
    "UnsupportedModelError": "errors",
    "CheckpointConfig": "settings.reversible",
    "ReversibleConfig": "settings.reversible",
    "StreamingConfig": "settings.streaming",
    "TokenSeekingConfig": "settings.seeking",
    "SeekingContext": "core.scorers",
    "register_scorer": "core.scorers",
    "Selection": "core.selection",
    "ReversibleHandle": "methods.reversible.handle",
    "checkpoint_in_two_levels": "methods.two_level",
    "make_reversible": "methods.reversible.handle",
    "load_reversible": "training.reversible.files",
    "save_reversible": "training.reversible.files",
    "CheckpointCallback": "training.reversible.callbacks",
    "ReversibleCallback": "training.reversible.callbacks",
    "Streaming": "methods.streaming.method",
    "TokenSeeking": "methods.seeking.method",
    "LiveBytes": "memory",
    "MemoryAccount": "memory",
    "MemoryEstimate": "memory.estimate",
    "StepLedger": "memory",
    "StepAccountCallback": "training.care.report.step_account",
    "estimate": "forecast.estimate",
    "SavedBytes": "memory",
    "MemEfficientArgumentsMixin": "training.arguments",
    "MemEfficientMixin": "training.trainer",
    "MemEfficientTrainer": "training.trainer",
    "MemEfficientTrainingArguments": "training.arguments",
    "LMEvalCallback": "training.harness",
    "MemoryCallback": "training.memory_callback",
    "MemoryReport": "training.care.report.memory_report",
    "PreflightReport": "training.care.preflight.report",
    "StreamingCallback": "training.callbacks",
    "TokenMapCallback": "training.callbacks",
    "TokenSeekingCallback": "training.callbacks",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    if _EXPORTS[name] == "training.trainer" and found.estimate is None:  # what forecasts is above what trains, and handed to it
        found.estimate = staticmethod(_estimate)
    return found


def _estimate(*args, **kwargs):
    return import_module(f"{__name__}.forecast.estimate").estimate(*args, **kwargs)


def __dir__():
    return [*globals(), *__all__]
