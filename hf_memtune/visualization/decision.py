"""How the tokens of a page were chosen, in words for a reader who has read neither the papers nor the settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_memtune.settings.scorers import facts_of

EXPLANATIONS = {
    "context": "how much attention this token gets, from itself and from the tokens that see it",
    "gradient": "how strongly the training loss reacts to this token",
    "combined": "attention received and reaction of the loss together, weighted as set",
    "loss": "how badly the model predicts the token that follows this one",
    "softmax_residual": "how far the model's prediction of the token that follows this one is from that token",
    "profit": "how probable the model finds the token that follows this one; keeping it changes what is learned",
    "excess_loss": "how much worse than a reference model it predicts the token that follows; keeping it changes what is learned",
    "true_gradient": "how strongly the training loss reacts to what the model has made of this token in the end",
}


@dataclass(frozen=True)
class Decision:
    """How tokens were chosen, as settled for the model at hand.

    scorer: name of what ranks them; `random` is no score. selection: "sample" (drawn by chance), "top" (the highest) or "labelled" (all that
    carry a label). ratio: share of the real tokens of each text to keep, (0, 1]. select_from: "labels" or "all", which may be chosen.
    always_keep: "first_last" or "none". floor: share of the draw that goes evenly to all. cap: most that a kept token may count for, or None.
    parameters: settings that the scorer reads, name -> value. weight: "dft" (the loss of a kept token is multiplied by the probability that the
    model gives its label) or "none".
    """

    scorer: str
    selection: str
    ratio: float
    select_from: str
    always_keep: str
    parameters: dict[str, Any] = field(default_factory=dict)
    floor: float = 0.5
    cap: float | None = None
    weight: str = "none"

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn by chance, with weights that make up for it."""
        return self.selection == "sample"

    def listed(self) -> dict[str, Any]:
        """The settings by their names, as they are given on the command line."""
        weight = {} if self.weight == "none" else {"token_weight": self.weight}
        if self.selection == "labelled":
            return {"token_selection": self.selection, "always_keep": self.always_keep} | weight
        named = {"token_scorer": self.scorer, **self.parameters, "token_selection": self.selection, "token_ratio": self.ratio}
        named |= {"select_from": self.select_from, "always_keep": self.always_keep}
        if self.samples and self.scorer != "random":  # whose draws are even throughout
            named["sample_floor"] = self.floor
        if self.samples and self.cap is not None:
            named["weight_cap"] = self.cap
        return named | weight

    def said(self) -> list[str]:
        """Three paragraphs: what decided, how many were kept and of which, what that means for the loss."""
        if self.selection == "labelled":
            counts = self._times or ", as in plain training"
            return [f"Every token that carries a label is kept, and counts once in the loss{counts}: no score decides anything."]
        if self.ratio == 1 and self._threshold is None:
            return ["Every token is kept (token_ratio is 1), as in plain training: no score decides anything."]
        return [self._ranked(), self._counted(), self._weighed()]

    @property
    def is_weighed(self) -> bool:
        """Whether the loss of a kept token is multiplied by the probability that the model gives its label."""
        return self.weight == "dft"

    @property
    def _threshold(self) -> float | None:
        return self.parameters.get("profit_threshold")

    @property
    def _times(self) -> str:
        return ", times the probability q that the model gives its label (token_weight=dft)" if self.is_weighed else ""

    def _ranked(self) -> str:
        if self.scorer == "random":
            even = "Tokens were drawn by chance, and no score had a part in it: of those that may be drawn, each is as likely as any other."
            return even if self.samples else "Tokens were picked at random, anew at every step of training: no score had a part in it."
        score = f"{self.scorer} score ({EXPLANATIONS.get(self.scorer, 'as named by the scorer')})"
        if not self.samples:
            return f"The tokens with the highest {score} were kept."
        return (
            f"Tokens were drawn by chance, the likelier the higher their {score}. "
            f"{share_in_words(self.floor)} of the weight in the draw goes evenly to all tokens that may be drawn, so that none is left out for good."
        )

    def _counted(self) -> str:
        from_labels = ", but only of those that carry a label (all of them, where they are fewer)" if self.select_from == "labels" else ""
        ends = " The first and the last token of each text are kept in any case." if self.always_keep == "first_last" else ""
        if self._threshold is not None:
            ends = f" Left out are those with a score below {self._threshold:g}; a text of no others keeps its best one.{ends}"
        return f"As many tokens are kept as make {100 * self.ratio:.4g} % of each text, rounded up{from_labels}.{ends}"

    def _weighed(self) -> str:
        if not self.samples and facts_of(self.scorer).known_in_backward:
            return (
                "No token has a probability here (token_selection=top): it is kept or it is not. The loss is that of all tokens, whose gradient says "
                "which are kept; what is learned is the part of it that reaches these."
            )
        if not self.samples:
            return (
                "No token has a probability here (token_selection=top): it is kept or it is not, and a kept token counts once in the loss"
                f"{self._times}, whatever its score."
            )
        capped, averaged = "", "is that of all tokens that carry a label" + ", each times its q" * self.is_weighed
        if self.cap is not None:
            capped, averaged = f", but at most {self.cap:g} times", "leans towards tokens that are often drawn, because of that limit"
        return (
            f"Each token has a chance p of being kept. A kept token counts 1/p times in the loss{capped}{self._times}, and so stands in for the tokens that "
            f"might have been drawn in its place: averaged over all draws, the loss {averaged}. "
            "What is marked as kept is one draw; another would keep others."
        )


def share_in_words(part: float) -> str:
    """At the beginning of a sentence."""
    return {0.5: "Half", 0.25: "A quarter"}.get(part, f"{100 * part:.4g} %")


def as_shown(value: Any) -> str:
    """A setting on a page: of a number what tells it from others."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def decisions_of(maps: Iterable[Any]) -> list[Decision]:
    """The decisions of some maps, each once, in order."""
    found: list[Decision] = []
    for each in maps:
        if each.decision is not None and each.decision not in found:
            found.append(each.decision)
    return found
