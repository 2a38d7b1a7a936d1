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
    "StreamOverflowError": "errors",
    "TokenScoreError": "errors",
    "UnsupportedModelError": "errors",
    "CheckpointConfig": "reversible_config",
    "ReversibleConfig": "reversible_config",
    "StreamingConfig": "config",
    "TokenSeekingConfig": "config",
    "SeekingContext": "core.scorers",
    "register_scorer": "core.scorers",
    "Selection": "core.selection",
    "ReversibleHandle": "strategies.reversible",
    "checkpoint_in_two_levels": "strategies.two_level",
    "make_reversible": "strategies.reversible",
    "load_reversible": "training.reversible.files",
    "save_reversible": "training.reversible.files",
    "CheckpointCallback": "training.reversible.callbacks",
    "ReversibleCallback": "training.reversible.callbacks",
    "Streaming": "strategies.streaming",
    "TokenSeeking": "strategies.token_seeking",
    "LiveBytes": "memory",
    "MemoryAccount": "memory",
    "MemoryEstimate": "memory.estimate",
    "StepLedger": "memory",
    "StepAccountCallback": "training.report.step_account",
    "estimate": "training.forecast.estimate",
    "SavedBytes": "memory",
    "MemEfficientArgumentsMixin": "training.arguments",
    "MemEfficientMixin": "training.trainer",
    "MemEfficientTrainer": "training.trainer",
    "MemEfficientTrainingArguments": "training.arguments",
    "MemoryCallback": "training.callbacks",
    "MemoryReport": "training.report.memory_report",
    "PreflightReport": "training.preflight.report",
    "StreamingCallback": "training.callbacks",
    "TokenMapCallback": "training.callbacks",
    "TokenSeekingCallback": "training.callbacks",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
