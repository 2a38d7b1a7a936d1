"""Settings of every strategy, as flat dataclass fields: they become CLI flags and YAML keys under the same names.

Each help text says the unit and what a larger value does. `problems()` lists everything that cannot work.
"""

from dataclasses import dataclass, field, fields

from hf_memtune.errors import ConfigError

GRADIENT_NORMS = ("l2", "l1", "sum")
CONTEXT_NORMALIZERS = ("sum", "mean")
SELECTION_POOLS = ("all", "labels")
ALWAYS_KEPT = ("none", "first_last")
SCHEDULES = ("step", "epoch", "once")


def _setting(default, help_text: str, choices=None):
    metadata = {"help": help_text}
    if choices is not None:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class TokenSeekingConfig:
    """Settings of token seeking and ditching (TokenSeek, arXiv 2601.19739; TokenTune, arXiv 2501.18824)."""

    token_seeking: bool = _setting(
        False, "Backpropagate through the best-scored tokens of each instance only; every token is still seen forward."
    )
    token_ratio: float = _setting(
        0.1,
        "Fraction of the real (not padding) tokens of each instance to keep, in (0, 1], rounded up, at least 1 token. "
        "Larger: gradients nearer to those of plain training, more memory, slower.",
    )
    token_scorer: str = _setting(
        "combined",
        "What ranks the tokens: combined (eq. 5 of TokenSeek), context (attention received), gradient, random "
        "(TokenTune), loss (of the token's own prediction), or a registered name.",
    )
    context_weight: float = _setting(
        1.0, "Alpha of eq. 5, no unit: weight of log(attention received) in the combined score. 0 leaves it out."
    )
    gradient_weight: float = _setting(
        1.0, "Beta of eq. 5, no unit: weight of the gradient score, scaled to [0, 1] per instance. 0 leaves it out."
    )
    context_layer: int = _setting(
        -1, "Layer whose attention is the context score, counted from 0; negative counts from the last layer."
    )
    context_normalize: str = _setting(
        "sum",
        "sum: attention a token receives from all rows, as in the paper, which favours early positions; mean: divided "
        "by the number of rows that can see the token.",
        CONTEXT_NORMALIZERS,
    )
    gradient_norm: str = _setting(
        "l2", "How the gradient at a token is accumulated over the hidden dimension: l2, l1, or signed sum.", GRADIENT_NORMS
    )
    select_from: str = _setting(
        "all",
        "Which tokens may be chosen: all, or labels (only those whose prediction carries a label; prompt tokens "
        "then take none of the budget).",
        SELECTION_POOLS,
    )
    always_keep: str | None = _setting(
        None,
        "Tokens kept whatever their score, out of the budget: none, or first_last (the first and the last real token). "
        "Default: first_last for token_scorer=random, as in TokenTune, else none.",
        ALWAYS_KEPT,
    )
    seek_schedule: str = _setting(
        "step",
        "When tokens are scored: step (every step, with the model as it is), epoch (one pass over the data set before "
        "each epoch), once (one pass before training, the paper's offline seeking, kept on disk and reused).",
        SCHEDULES,
    )
    seek_cache_dir: str | None = _setting(
        None, "Folder for the scores of seek_schedule=once. Default: beside the data set, else in output_dir."
    )
    context_chunk_size: int = _setting(
        512,
        "Tokens of each row that go through the pass over all tokens at a time (causal models; others run whole). "
        "Smaller: less memory, more kernel launches.",
    )

    @classmethod
    def of(cls, settings: "TokenSeekingConfig", **changed) -> "TokenSeekingConfig":
        """These settings alone, out of arguments that have more fields, with some of them changed."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)} | changed)

    def __post_init__(self):
        found = self.problems()
        if found:
            raise ConfigError(found)

    @property
    def kept_always(self) -> str:
        """`always_keep` with its default resolved."""
        return self.always_keep or ("first_last" if self.token_scorer == "random" else "none")

    def problems(self) -> list[str]:
        """Every value that cannot work, as one message each: setting, got, expected."""
        checks = [
            (0 < self.token_ratio <= 1, "token_ratio", "a fraction in (0, 1], such as 0.1 for a tenth of the tokens"),
            (self.context_weight >= 0, "context_weight", "0 or more"),
            (self.gradient_weight >= 0, "gradient_weight", "0 or more"),
            (self.context_chunk_size >= 1, "context_chunk_size", "1 token or more"),
            (self.context_normalize in CONTEXT_NORMALIZERS, "context_normalize", f"one of {CONTEXT_NORMALIZERS}"),
            (self.gradient_norm in GRADIENT_NORMS, "gradient_norm", f"one of {GRADIENT_NORMS}"),
            (self.select_from in SELECTION_POOLS, "select_from", f"one of {SELECTION_POOLS}"),
            (self.always_keep in (None, *ALWAYS_KEPT), "always_keep", f"one of {ALWAYS_KEPT}"),
            (self.seek_schedule in SCHEDULES, "seek_schedule", f"one of {SCHEDULES}"),
        ]
        found = [f"{name}: got {getattr(self, name)!r}, expected {wanted}." for holds, name, wanted in checks if not holds]
        return found + self._impossible_combinations()

    def _impossible_combinations(self) -> list[str]:
        found = []
        if self.token_scorer == "combined" and self.context_weight == self.gradient_weight == 0:
            found.append(
                "context_weight and gradient_weight: both are 0, so token_scorer=combined would rank nothing. "
                "Raise one of them, or choose token_scorer=random."
            )
        if self.token_scorer == "random" and self.seek_schedule != "step":
            found.append(
                f"seek_schedule: got {self.seek_schedule!r} with token_scorer=random, expected 'step': a random choice needs "
                "no pass over the data set, and TokenTune draws it anew each step."
            )
        return found

    def ineffective(self) -> list[str]:
        """Settings that were changed but have no effect under the others, for a warning: nothing is ignored in silence."""
        changed = {f.name for f in fields(TokenSeekingConfig) if getattr(self, f.name) != f.default}
        changed.discard("token_seeking")
        if not self.token_seeking:
            return [f"{name} has no effect without token_seeking" for name in sorted(changed)]
        reads_context = self.token_scorer not in ("gradient", "random", "loss")
        reads_gradient = self.token_scorer not in ("context", "random", "loss")
        idle = {
            "context_weight": self.token_scorer != "combined",
            "gradient_weight": self.token_scorer != "combined",
            "context_layer": not reads_context,
            "context_normalize": not reads_context,
            "gradient_norm": not reads_gradient,
            "seek_cache_dir": self.seek_schedule != "once",
        }
        return [
            f"{name} has no effect with token_scorer={self.token_scorer}, seek_schedule={self.seek_schedule}"
            for name in sorted(changed)
            if idle.get(name)
        ]
