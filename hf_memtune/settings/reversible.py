"""Settings of reversible layers and their adapters, and of two-level checkpointing, as flat dataclass fields.

What is not given is None until `filled()`.
"""

from dataclasses import dataclass, fields
from typing import Any

from hf_memtune.settings.presets import ADAPTER_DEFAULTS, COUPLING_FACTORS
from hf_memtune.settings.protocol import Condition, MethodSettings, changed_fields, one_of, setting, unmet

COUPLINGS = ("none", *COUPLING_FACTORS)
NUMERICS = ("exact", "float")
OUTPUTS = ("newest", "mean", "sum")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


def _filled(name: str, help_text: str, choices=None):
    return setting(None, f"{help_text} Default: {ADAPTER_DEFAULTS[name]}.", choices)


@dataclass
class ReversibleConfig(MethodSettings):
    """Settings of reversible layers (MEFT, arXiv 2306.00477, and the centred coupling).

    Names that begin otherwise than `reversible` are of adapters and the head.
    """

    reversible: str = setting(
        "none",
        "Couple the layers into reversible ones, whose activations are rebuilt in backward and not kept. centred: keeps the function "
        "of the pre-trained model up to terms of the scale. meft1, meft2, meft3: the couplings of MEFT. none: off.",
        COUPLINGS,
    )
    reversible_scale: float | None = setting(
        None,
        "Factor of the older stream, no unit: c of centred, lambda of meft1, meft2, meft3. Smaller: nearer to the pre-trained model, "
        "more stored bits (exact) or a worse inverse (float). exact: a power of two, such as 0.125. Default: 1/16 for centred; for "
        "meft1, meft2, meft3 0.1, 1, 0.1 as in the paper, with reversible_numerics=exact 1/8 in place of 0.1.",
    )
    reversible_beta: float | None = setting(
        None,
        "Factor of the second stream, no unit: beta of meft1, meft2, meft3, as reversible_scale. Default: 1, 0.1, 0.1 as in the "
        "paper, with reversible_numerics=exact 1/8 in place of 0.1.",
    )
    reversible_numerics: str = setting(
        "exact",
        "exact: streams in 32-bit fixed point, with the log2(1/factor) bits that each layer would lose kept beside them: gradients "
        "are right at every depth. float: nothing is kept; the error of the inverse grows by 1/factor a layer.",
        NUMERICS,
    )
    reversible_layers: int | None = setting(
        None,
        "How many layers of each stack are reversible, counted from the bottom; the others keep their activations, as usual. Default: all.",
    )
    reversible_output: str | None = setting(
        None,
        "What the reversible layers hand on: newest stream, mean of both, or sum of the newest and reversible_scale times the older. "
        "Default: newest for centred; for meft1, meft2, meft3 as in the paper, mean for post-norm layers (BERT), sum for pre-norm "
        "ones (OPT).",
        OUTPUTS,
    )
    reversible_fraction_bits: int | None = setting(
        None,
        "exact: bits after the binary point, of 32. More: finer steps, less range. Default: 20 for post-norm layers (states below "
        "2,048), 12 for pre-norm ones (below 524,288).",
    )
    adapter_rank: int | None = _filled(
        "adapter_rank",
        "Width of the adapters in every layer; everything else but the head is frozen then. 0: no adapters, and what is trainable "
        "stays so, such as LoRA inside the layers (centred only).",
    )
    adapter_dropout: float | None = _filled("adapter_dropout", "Probability of dropout inside the adapters, in [0, 1).")
    adapter_activation: str | None = _filled("adapter_activation", "Activation inside the adapters.", ACTIVATIONS)
    adapter_init_std: float | None = _filled(
        "adapter_init_std", "Standard deviation of the adapters' weights at the start (biases are 0). Larger: farther from the model."
    )
    train_head: bool | None = setting(
        None,
        "Train what follows the layers (pooler and head) beside the adapters. Default: yes, except for language models, whose head is "
        "pre-trained and often tied to the embeddings.",
    )

    def filled(self) -> "ReversibleConfig":
        """With what was not given; but reversible_output, reversible_fraction_bits, reversible_layers and train_head need the model."""
        missing = {name: value for name, value in _defaults(self).items() if getattr(self, name) is None}
        return ReversibleConfig.of(self, **missing)

    def problems(self) -> list[str]:
        return (unmet(self, [*_choices(self), *_ranges(self)]) or _combinations(self)) + super().problems()

    def ineffective(self) -> dict[str, str]:
        given = [each.name for each in changed_fields(self, ReversibleConfig)]
        return {name: reason for name, reason in _idle(self).items() if name in given} | super().ineffective()


def _defaults(config: Any) -> dict[str, Any]:
    factors = COUPLING_FACTORS.get(config.reversible, {}).get(config.reversible_numerics, {})
    return ADAPTER_DEFAULTS | factors


def _choices(config: Any) -> list[Condition]:
    allowed = {
        "reversible": COUPLINGS,
        "reversible_numerics": NUMERICS,
        "reversible_output": (None, *OUTPUTS),
        "adapter_activation": (None, *ACTIVATIONS),
    }
    return one_of(config, allowed)


def _ranges(config: Any) -> list[Condition]:
    def given(name: str, holds) -> bool:
        value = getattr(config, name)
        return value is None or holds(value)

    return [
        (given("reversible_scale", lambda x: 0 < x <= 1), "reversible_scale", "a factor in (0, 1]"),
        (given("reversible_beta", lambda x: 0 < x <= 1), "reversible_beta", "a factor in (0, 1]"),
        (given("reversible_layers", lambda x: x >= 2), "reversible_layers", "2 layers or more"),
        (given("reversible_fraction_bits", lambda x: 0 <= x <= 30), "reversible_fraction_bits", "0 to 30 bits"),
        (given("adapter_rank", lambda x: x >= 0), "adapter_rank", "0 (none) or more"),
        (given("adapter_dropout", lambda x: 0 <= x < 1), "adapter_dropout", "a probability in [0, 1)"),
        (given("adapter_init_std", lambda x: x >= 0), "adapter_init_std", "0 or more"),
    ]


def _combinations(config: Any) -> list[str]:
    if config.reversible == "none":
        return []
    filled = _defaults(config) | {name: getattr(config, name) for name in _defaults(config) if getattr(config, name) is not None}
    found = []
    for name in ("reversible_scale", "reversible_beta"):
        factor = filled[name]
        if factor is not None and config.reversible_numerics == "exact" and not _has_bits(factor):
            found.append(
                f"{name}: got {factor} with reversible_numerics=exact, expected a power of two from 1/256 to 1, such as 0.125 (for the 0.1 "
                "of the paper) or 0.0625. Or choose reversible_numerics=float."
            )
    if config.reversible == "centred" and filled["reversible_scale"] == 1:
        found.append("reversible_scale: got 1 with reversible=centred, which then would not move. Expected less, such as 0.0625.")
    if config.reversible != "centred" and filled["adapter_rank"] == 0:
        found.append(
            f"adapter_rank: got 0 with reversible={config.reversible}, of which one stream is updated by adapters. Expected 1 or more, or "
            "reversible=centred."
        )
    return found


def _has_bits(factor: float) -> bool:
    return factor in [2.0**-bits for bits in range(9)]


def _idle(config: Any) -> dict[str, str]:
    """Names of the settings that are not read, each with the reason."""
    names = [f.name for f in fields(ReversibleConfig) if f.name != "reversible"]
    if config.reversible == "none":
        return dict.fromkeys(names, "without reversible")
    found = {}
    if config.reversible == "centred":
        found["reversible_beta"] = "with reversible=centred"
    if config.reversible_numerics == "float":
        found["reversible_fraction_bits"] = "with reversible_numerics=float"
    if config.adapter_rank == 0:
        found |= dict.fromkeys(("adapter_dropout", "adapter_activation", "adapter_init_std", "train_head"), "with adapter_rank=0")
    return found


@dataclass
class CheckpointConfig(MethodSettings):
    """Settings of two-level checkpointing, the rival of reversible layers: exact, the model as it is, one forward more."""

    checkpoint_levels: int | None = setting(
        None,
        "2: checkpoint the layers on two levels: about 2 sqrt(layers) of their inputs are alive, not all; costs one forward more than "
        "activation_checkpointing, which is one level. Gradients are those of plain training. Default: off.",
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.checkpoint_levels in (None, 2):
            return found
        return [f"checkpoint_levels: got {self.checkpoint_levels!r}, expected 2, or none. One level is activation_checkpointing.", *found]
