"""Values of the settings that a preset fills: those of the library, and of each published method."""

from typing import Any

# One row a setting that may be left out. A preset lacks what its paper leaves open or does not use: the library's value holds.
# always_keep None: first_last for token_scorer=random, as in TokenTune, else none.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "token_ratio": 0.1,
        "token_scorer": "combined",
        "context_weight": 1.0,
        "gradient_weight": 1.0,
        "context_layer": -1,
        "context_normalize": "sum",
        "gradient_norm": "l2",
        "select_from": "all",
        "always_keep": None,
        "seek_schedule": "step",
        "token_selection": "top",
        "token_gradient": "cut",
    },
    "tokenseek": {  # arXiv 2601.19739; context_layer and gradient_norm are not in the paper
        "token_ratio": 0.1,
        "token_scorer": "combined",
        "context_weight": 1.0,
        "gradient_weight": 1.0,
        "context_layer": -1,
        "context_normalize": "sum",
        "gradient_norm": "l2",
        "select_from": "all",
        "always_keep": "none",
        "seek_schedule": "once",
        "token_selection": "top",
        "token_gradient": "cut",
    },
    "tokentune": {  # arXiv 2501.18824
        "token_ratio": 0.1,
        "token_scorer": "random",
        "select_from": "all",
        "always_keep": "first_last",
        "seek_schedule": "step",
        "token_selection": "top",
        "token_gradient": "cut",
    },
}
PRESET_NAMES = tuple(name for name in PRESETS if name is not None)


def preset_values(preset: str | None) -> dict[str, Any]:
    """The value of every setting that may be left out. An unknown preset fills nothing of its own: it is a problem elsewhere."""
    return PRESETS[None] | PRESETS.get(preset, {})


def described_default(name: str) -> str:
    """A sentence for the help text: the library's value of a setting, and those of the presets that fill it."""
    filled = [f"{preset}: {PRESETS[preset][name]}" for preset in PRESET_NAMES if name in PRESETS[preset]]
    by_scorer = "first_last for token_scorer=random, as in TokenTune, else none"
    default = by_scorer if name == "always_keep" and PRESETS[None][name] is None else PRESETS[None][name]
    return f"Default: {default}" + (f" (presets: {', '.join(filled)})." if filled else ".")
