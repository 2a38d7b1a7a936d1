"""Settings of token seeking and ditching, beside those of streaming, which a part of it does: see streaming.py.

A setting that a preset may fill is None until it is given, and is filled when the settings are made: see presets.py.
"""

from dataclasses import dataclass, fields
from typing import Any

from hf_memtune.settings.presets import PRESET_NAMES, PRESETS, described_default, preset_values, row_loss_values
from hf_memtune.settings.protocol import Condition, changed_fields, one_of, setting, unmet
from hf_memtune.settings.scorers import facts_of
from hf_memtune.settings.streaming import StreamingConfig

GRADIENT_NORMS = ("l2", "l1", "sum")
CONTEXT_NORMALIZERS = ("sum", "mean")
SELECTION_POOLS = ("all", "labels")
ALWAYS_KEPT = ("none", "first_last")
SCHEDULES = ("step", "epoch", "once")
SELECTIONS = ("top", "sample", "labelled")
TOKEN_WEIGHTS = ("none", "dft")
TOKEN_GRADIENTS = ("cut", "stream", "skip")
_OF_COMBINED = ("context_weight", "gradient_weight")
_OF_BUILT_IN = (*_OF_COMBINED, "reference_model", "profit_threshold")  # settings of one scorer
_OF_A_CHOICE = ("token_scorer", "select_from", "sample_floor", "weight_cap", "reference_model")  # and there is none where all are kept
_OF_PARTS = ("context_layer", "context_normalize", "gradient_norm")  # of what any scorer may ask for
# A chunk of skip is what can be left out as a whole, so it is smaller than one that only bounds memory.
STREAM_CHUNKS = {"stream": 512, "skip": 64}


def _filled(name: str, help_text: str, choices=None):
    """A setting that a preset may fill."""
    return setting(None, f"{help_text} {described_default(name)}", choices)


@dataclass
class TokenSeekingConfig(StreamingConfig):
    """Settings of token seeking and ditching (TokenSeek, arXiv 2601.19739; TokenTune, arXiv 2501.18824).

    Settings filled from a preset are made concrete when the object is. `of` carries over which of them were given, so a changed
    `preset` or `token_scorer` fills the others anew; dataclasses.replace hands every value on as it is.
    """

    token_seeking: bool = setting(
        False, "Backpropagate through a part of the tokens of each instance only (token_ratio); every token is still seen forward."
    )
    preset: str | None = setting(
        None,
        "Published method whose settings fill those that are not given: tokenseek (TokenSeek, scored once before training) or "
        "tokentune (TokenTune, random tokens). Default: none, the library's own choices.",
        PRESET_NAMES,
    )
    token_ratio: float | None = _filled(
        "token_ratio",
        "Fraction of the real (not padding) tokens of each instance to keep, in (0, 1], rounded up, at least 1 token. "
        "Larger: gradients nearer to those of plain training, more memory, slower.",
    )
    token_scorer: str | None = _filled(
        "token_scorer",
        "What ranks the tokens: combined (eq. 5 of TokenSeek), context (attention received), gradient (at the last block), true_gradient (of "
        "the loss that was taken, whatever it is, at the last hidden states; chosen in backward), softmax_residual (of the model's own loss, at "
        "the logits; chosen before the head), random (TokenTune; with token_selection=sample every token has the same probability), loss (of the token's own "
        "prediction), or a registered name. These change what is learned, and need token_selection=top: profit (the token's probability: the least "
        "probable ones are left out), excess_loss (loss above that of reference_model, Rho-1).",
    )
    context_weight: float | None = _filled(
        "context_weight",
        "Alpha of eq. 5, no unit: weight of log(attention received) in the combined score. 0 leaves it out.",
    )
    gradient_weight: float | None = _filled(
        "gradient_weight",
        "Beta of eq. 5, no unit: weight of the gradient score, scaled to [0, 1] per instance. 0 leaves it out.",
    )
    context_layer: int | None = _filled(
        "context_layer",
        "Layer whose attention is the context score, counted from 0; negative counts from the last layer.",
    )
    context_normalize: str | None = _filled(
        "context_normalize",
        "sum: attention a token receives from all rows, as in the paper, which favours early positions; mean: divided "
        "by the number of rows that can see the token.",
        CONTEXT_NORMALIZERS,
    )
    gradient_norm: str | None = _filled(
        "gradient_norm",
        "How the gradient at a token is accumulated over the hidden dimension: l2, l1, or signed sum.",
        GRADIENT_NORMS,
    )
    select_from: str | None = _filled(
        "select_from",
        "Which tokens may be chosen: all, or labels (only those whose prediction carries a label; prompt tokens are then never chosen). "
        "Where the loss is one for a row, such as a class, all.",
        SELECTION_POOLS,
    )
    token_selection: str | None = _filled(
        "token_selection",
        "How scores choose. top: the highest, as in the papers. sample: drawn without replacement with probability growing with "
        "the score, each kept token's loss weighted by the inverse of its inclusion probability, so that the expected loss "
        "gradient is that of all labelled tokens. labelled: every token with a label, none drawn; token_ratio is not read.",
        SELECTIONS,
    )
    sample_floor: float | None = setting(
        None,
        "token_selection=sample: share, in (0, 1], of the even distribution in that of each draw. Larger: weights nearer to each other, scores "
        "count less. Default: 0.25 for true_gradient and softmax_residual, to the size of whose scores the rest is proportional, else 0.5.",
    )
    weight_cap: float | None = setting(
        None,
        "token_selection=sample: most that the weight of a kept token may be, 1 or more. Smaller: less noise, and a gradient that is "
        "biased towards tokens that are often drawn. Default: none.",
    )
    token_weight: str = setting(
        "none",
        "What the loss of a kept token is multiplied by, which changes what is learned: none, or dft (the probability that the model gives its "
        "label: Dynamic Fine-Tuning, arXiv 2508.05629).",
        TOKEN_WEIGHTS,
    )
    reference_model: str | None = setting(
        None,
        "token_scorer=excess_loss: folder or hub name of the model whose loss is subtracted, of the same tokenizer; an earlier checkpoint, say.",
    )
    profit_threshold: float | None = setting(
        None,
        "token_scorer=profit: probability, in (0, 1), below which tokens are left out, such as the 0.1 of ProFit. Larger: fewer tokens. token_ratio "
        "is then the most that are kept; with 1 the threshold alone decides. A row that is below it throughout keeps its most probable token. "
        "Default: none, the token_ratio most probable ones are kept.",
    )
    token_gradient: str | None = _filled(
        "token_gradient",
        "What the gradient of the kept tokens flows through. cut: keys and values of the other tokens are constants, as in the "
        "papers. stream: the exact gradient through all keys and values, by streaming. skip: streaming in which tokens without "
        "loss whose incoming key and value gradient is below skip_threshold of the row's total are not recomputed.",
        TOKEN_GRADIENTS,
    )
    skip_threshold: float = setting(
        0.01,
        "token_gradient=skip: share, in [0, 1], of the key and value gradient of a row below which tokens without loss are left "
        "out of backward. Larger: faster, further from the exact gradient. 0 leaves out nothing.",
    )
    always_keep: str | None = _filled(
        "always_keep",
        "Tokens that are always kept, and count towards token_ratio: none, or first_last (the first and the last real token).",
        ALWAYS_KEPT,
    )
    seek_schedule: str | None = _filled(
        "seek_schedule",
        "When tokens are scored: step (every step, with the model as it is), epoch (one pass over the data set before "
        "each epoch), once (one pass before training, the paper's offline seeking, kept on disk and reused).",
        SCHEDULES,
    )
    seek_cache_dir: str | None = setting(
        None, "Folder for the scores of seek_schedule=once. Default: beside the data set, else in output_dir."
    )
    context_chunk_size: int = setting(
        512,
        "Tokens of each row that go through the pass over all tokens at a time (causal models; others run whole). "
        "Smaller: less memory, more kernel launches.",
    )

    @classmethod
    def of(cls, settings: "TokenSeekingConfig", **changed) -> "TokenSeekingConfig":
        """These settings alone, out of arguments that have more fields, with some of them changed.

        What was not given there is filled again, so that it follows a changed preset.
        """
        return super().of(settings, **dict.fromkeys(PRESETS[None].keys() - settings.given) | changed)

    def _fill(self) -> None:
        """Fill in what was not given, and remember with what."""
        super()._fill()
        values = preset_values(self.preset)
        left_out = {name for name in values if getattr(self, name) is None}
        if all(values[name] is None for name in left_out):
            # nothing was left out: a copy of settings that are filled already, where what equals a default is one
            left_out = {name for name in values if getattr(self, name) == values[name]}
        self._filled = {name: values[name] for name in left_out}
        for name, value in self._filled.items():
            setattr(self, name, value)

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings a preset may fill that were given, or changed since, even to what would be filled in."""
        kept = {name for name, value in self._filled.items() if getattr(self, name) == value}
        return frozenset(PRESETS[None].keys() - kept)

    @property
    def streams(self) -> bool:
        """Whether backward goes through the rows in chunks."""
        return self.token_gradient in STREAM_CHUNKS if self.token_seeking else super().streams

    @property
    def stream_chunk_size(self) -> int | None:
        """Tokens of each row in a chunk of streaming, or None where nothing streams."""
        if not self.streams or self.sequence_chunk_size is not None:
            return super().stream_chunk_size
        return STREAM_CHUNKS[self.token_gradient]

    @property
    def keeps_attention(self) -> bool:
        """Not of chunks of which some tokens are skipped."""
        return super().keeps_attention and not (self.token_seeking and self.token_gradient == "skip")

    @property
    def switch(self) -> str | None:
        """Name of the setting that turns the strategy on, or None where none is on."""
        return "token_seeking" if self.token_seeking else super().switch

    @property
    def streamed_by(self) -> str | None:
        """Name of the setting that makes backward stream, or None."""
        return "token_gradient" if self.token_seeking and self.streams else super().streamed_by

    @property
    def is_mean_of_kept(self) -> bool:
        """Whether the model's own loss of tokens is the mean over those kept; streaming keeps all, a sample stands for all, and what is chosen in
        backward had no part in the loss."""
        return self.token_seeking and self.token_selection == "top" and not facts_of(self.token_scorer).known_in_backward

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept: plain training, but for what token_gradient=skip leaves out."""
        return self.token_ratio == 1 and self.token_selection != "labelled" and self.threshold is None

    @property
    def threshold(self) -> float | None:
        """The score below which tokens are left out, or None."""
        return self.profit_threshold if self.token_scorer == "profit" and self.token_selection != "labelled" else None

    @property
    def kept_always(self) -> str:
        """`always_keep` with its default resolved."""
        is_tokentune = self.token_scorer == "random" and self.token_selection == "top"
        return self.always_keep or ("first_last" if is_tokentune else "none")

    def for_row_loss(self) -> "TokenSeekingConfig":
        """The same for a model whose loss is one for a row: what was not given follows what was measured on such."""
        changed = {name: value for name, value in row_loss_values(self.preset).items() if name not in self.given}
        return self.of(self, **changed) if changed else self

    def problems(self) -> list[str]:
        return unmet(self, [*self._ranges(), *self._choices()]) + self._impossible_combinations() + super().problems()

    def _ranges(self) -> list[Condition]:
        return [
            (0 < self.token_ratio <= 1, "token_ratio", "a fraction in (0, 1], such as 0.1 for a tenth of the tokens"),
            (self.context_weight >= 0, "context_weight", "0 or more"),
            (self.gradient_weight >= 0, "gradient_weight", "0 or more"),
            (0 <= self.skip_threshold <= 1, "skip_threshold", "a share in [0, 1], such as 0.01 for a hundredth"),
            (self.context_chunk_size >= 1, "context_chunk_size", "1 token or more"),
            (self.sample_floor is None or 0 < self.sample_floor <= 1, "sample_floor", "a share in (0, 1], such as 0.25"),
            (self.profit_threshold is None or 0 < self.profit_threshold < 1, "profit_threshold", "a probability in (0, 1), such as 0.1"),
            (self.weight_cap is None or self.weight_cap >= 1, "weight_cap", "1 or more: what a token that is always kept counts for"),
        ]

    def _choices(self) -> list[Condition]:
        allowed = {
            "preset": (None, *PRESET_NAMES),
            "context_normalize": CONTEXT_NORMALIZERS,
            "gradient_norm": GRADIENT_NORMS,
            "select_from": SELECTION_POOLS,
            "token_selection": SELECTIONS,
            "token_weight": TOKEN_WEIGHTS,
            "token_gradient": TOKEN_GRADIENTS,
            "always_keep": (None, *ALWAYS_KEPT),
            "seek_schedule": SCHEDULES,
        }
        return one_of(self, allowed)

    def _impossible_combinations(self) -> list[str]:
        found = []
        if self.token_seeking and self.chunk_is_open:
            found.append(
                "sequence_chunk_size: got 'auto' with token_seeking, whose chunks are not chosen by themselves. Give a number of tokens; "
                "or leave token_seeking out."
            )
        if self.token_scorer == "combined" and self.context_weight == self.gradient_weight == 0:
            found.append(
                "context_weight and gradient_weight: both are 0, so token_scorer=combined would rank nothing. "
                "Raise one of them, or choose token_scorer=random."
            )
        facts = facts_of(self.token_scorer)
        if self.token_seeking and facts.changes_objective and self.token_selection == "sample":
            found.append(
                f"token_selection: got 'sample' with token_scorer={self.token_scorer}, which is to leave tokens out: the weights of a draw make up "
                "for those that are not drawn, so that all would be learned as before. Set token_selection=top."
            )
        if self.token_seeking and facts.asks_for("reference_loss") and self.reference_model is None:
            found.append(
                f"reference_model: got None with token_scorer={self.token_scorer}. Give the folder or the hub name of a model of the same tokenizer."
            )
        if self.token_seeking and self.token_selection == "labelled" and self.token_gradient == "stream":
            found.append(
                "token_selection: got 'labelled' with token_gradient=stream, which is plain training. Leave token_seeking out, and set "
                "sequence_chunk_size; or choose token_gradient=cut."
            )
        if self.token_selection == "labelled" and self.seek_schedule != "step":
            found.append(
                f"seek_schedule: got {self.seek_schedule!r} with token_selection=labelled, which reads no scores. Expected 'step'."
            )
        if self.token_seeking and self.token_weight == "dft" and self.keeps_all:
            found.append(
                "token_weight: got 'dft' with token_ratio=1, whose loss is the model's own. Lower token_ratio, or set token_selection=labelled; or "
                "train on all tokens with trl's loss_type=dft."
            )
        if self.token_seeking and self.token_weight == "dft" and facts.known_in_backward and self.token_selection != "labelled":
            found.append(
                f"token_weight: got 'dft' with token_scorer={self.token_scorer}, whose tokens are chosen after their loss is taken, so that neither the loss "
                "nor the head would be weighed. Choose softmax_residual, or leave token_weight out."
            )
        is_chosen = "token_scorer" in self.given or "token_scorer" in PRESETS.get(self.preset or "", {})
        return found + (self.schedule_problems() if is_chosen else [])

    def schedule_problems(self) -> list[str]:
        """What a random choice cannot do. Not among the others where token_scorer was left out: a Trainer may be given a function."""
        if self.token_scorer != "random" or self.seek_schedule == "step":
            return []
        origin = "" if "seek_schedule" in self.given or self.preset is None else f" of preset={self.preset}"
        return [
            f"seek_schedule: got {self.seek_schedule!r}{origin} with token_scorer=random, expected 'step': a random choice needs no "
            "pass over the data set, and is drawn anew each step. For scores that last choose token_scorer=combined, for one."
        ]

    def ineffective(self) -> dict[str, str]:
        given = self.given | {f.name for f in changed_fields(self, TokenSeekingConfig) if f.name not in PRESETS[None]}
        if not self.token_seeking:
            idle = given - {"token_seeking"} - {f.name for f in fields(StreamingConfig)}
            return super().ineffective() | dict.fromkeys(sorted(idle), "without token_seeking")
        by_default = "token_scorer" not in self.given and self.preset is None
        others = ", unless the trainer is given a function, or a model whose loss is one for a row" if by_default else ""
        found = {}
        for name, cause in sorted(self.idle().items()):
            if name in given:
                is_of_scorer = cause == "token_scorer" and name in (*_OF_PARTS, "sample_floor")
                found[name] = f"with {cause}={getattr(self, cause)}{others if is_of_scorer else ''}"
        return found | super(StreamingConfig, self).ineffective()  # of what is of streaming, it is said here

    def scorer_settings(self, everything: bool = False) -> dict[str, Any]:
        """The settings that token_scorer reads, by name. everything: those that a scorer of one's own may read."""
        idle = self.idle()
        read = _OF_PARTS if everything else (name for name in (*_OF_BUILT_IN, *_OF_PARTS) if name not in idle)
        return {name: value for name in read if (value := getattr(self, name)) is not None}

    def idle(self) -> dict[str, str]:
        """Names of the settings that are not read, each with the setting because of which it is not."""
        scorer, found = facts_of(self.token_scorer), {}
        if self.token_scorer != "combined":
            found |= dict.fromkeys(_OF_COMBINED, "token_scorer")
        if not scorer.may_ask_for("context_score"):
            found |= dict.fromkeys(("context_layer", "context_normalize"), "token_scorer")
        if not scorer.may_ask_for("gradient_score", "true_gradient"):
            found["gradient_norm"] = "token_scorer"
        if not scorer.asks_for("reference_loss"):
            found["reference_model"] = "token_scorer"
        if self.token_scorer != "profit":
            found["profit_threshold"] = "token_scorer"
        if self.token_scorer == "random":  # the same for all: every share of the draw is even
            found["sample_floor"] = "token_scorer"
        if self.token_selection != "sample":
            found |= dict.fromkeys(("sample_floor", "weight_cap"), "token_selection")
        if self.token_selection == "labelled":
            found |= dict.fromkeys((*_OF_A_CHOICE, "token_ratio", "profit_threshold"), "token_selection")
        elif self.keeps_all:
            found |= dict.fromkeys(_OF_A_CHOICE, "token_ratio")
        if self.seek_schedule != "once":
            found["seek_cache_dir"] = "seek_schedule"
        if self.token_gradient != "skip":
            found["skip_threshold"] = "token_gradient"
        if self.token_gradient != "stream":
            found["keep_attention_outputs"] = "token_gradient"
        unread = ("context_chunk_size",) if self.streams else ("sequence_chunk_size", "kv_offload")
        return found | dict.fromkeys((*unread, "chunk_budget", "stream_order"), "token_gradient")
