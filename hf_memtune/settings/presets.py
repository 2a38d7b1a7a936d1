"""Values of the settings that a preset fills: those of the library, and of each published method."""

from typing import Any

# One row a setting that may be left out. A preset lacks what its paper leaves open or does not use: the library's value holds.
# The library's own are chosen by what was measured in docs/results.md.
# always_keep None: first_last for top of token_scorer=random, as in TokenTune, else none.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "token_ratio": 0.3,
        "token_scorer": "random",
        "context_weight": 1.0,
        "gradient_weight": 1.0,
        "context_layer": -1,
        "context_normalize": "sum",
        "gradient_norm": "l2",
        "select_from": "labels",
        "always_keep": None,
        "seek_schedule": "step",
        "token_selection": "sample",
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
# In place of the library's own where the loss is one for a row, such as a class: its tokens cannot be weighed.
ROW_LOSS: dict[str, Any] = {"token_scorer": "context", "token_selection": "top"}
# Of values that depend on others.
_IN_WORDS = {
    "token_scorer": "random, or context where the loss is one for a row, such as a class",
    "always_keep": "first_last for token_selection=top with token_scorer=random, as in TokenTune, else none",
    "token_selection": "sample, or top where the loss is one for a row",
}
PRESET_NAMES = tuple(name for name in PRESETS if name is not None)


def preset_values(preset: str | None) -> dict[str, Any]:
    """The value of every setting that may be left out. An unknown preset fills nothing of its own: it is a problem elsewhere."""
    return PRESETS[None] | PRESETS.get(preset, {})


def row_loss_values(preset: str | None) -> dict[str, Any]:
    """What a loss for a row changes of them: nothing that a preset fills."""
    return {name: value for name, value in ROW_LOSS.items() if preset is None or name not in PRESETS.get(preset, {})}


def described_default(name: str) -> str:
    """A sentence for the help text: the library's value of a setting, and those of the presets that fill it."""
    filled = [f"{preset}: {PRESETS[preset][name]}" for preset in PRESET_NAMES if name in PRESETS[preset]]
    default = _IN_WORDS.get(name, PRESETS[None][name])
    return f"Default: {default}" + (f" (presets: {', '.join(filled)})." if filled else ".")


# Couplings of reversible layers, by reversible and then reversible_numerics: factors of the streams (lam and beta of MEFT, arXiv
# 2306.00477, table 1; c of the centred coupling). Fixed point needs powers of two: 1/8 stands for the 0.1 of the paper.
# beta None: the coupling has none. What the stack hands on (reversible_output) depends on the model: see architectures/layouts.py.
COUPLING_FACTORS: dict[str, dict[str, dict[str, float | None]]] = {
    "centred": dict.fromkeys(("exact", "float"), {"reversible_scale": 1 / 16, "reversible_beta": None}),
    "meft1": {
        "exact": {"reversible_scale": 1 / 8, "reversible_beta": 1.0},
        "float": {"reversible_scale": 0.1, "reversible_beta": 1.0},
    },
    "meft2": {
        "exact": {"reversible_scale": 1.0, "reversible_beta": 1 / 8},
        "float": {"reversible_scale": 1.0, "reversible_beta": 0.1},
    },
    "meft3": {
        "exact": {"reversible_scale": 1 / 8, "reversible_beta": 1 / 8},
        "float": {"reversible_scale": 0.1, "reversible_beta": 0.1},
    },
}
ADAPTER_DEFAULTS: dict[str, Any] = {
    "adapter_rank": 8,  # the paper's for BERT; it has 64 for OPT
    "adapter_dropout": 0.0,
    "adapter_activation": "relu",
    "adapter_init_std": 0.02,
}
