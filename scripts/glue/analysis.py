"""Numbers of the page, from the records: means over seeds, intervals, differences seed by seed."""

from statistics import median

from quality import records
from quality.analysis import Interval, Seeds, interval

from glue.arms import ADAPTERS, FLAGS, FULL

CHANCE_MARGIN = 0.05  # of accuracy: an arm that ends this near to where it began has learned nothing to speak of


class Group(Seeds):
    """Those of one arm, by accuracy."""

    def share_of_bytes(self, other: "Group") -> float:
        """Median over common seeds: the traced batch is that of the seed."""
        return median(self.runs[seed]["peak_bytes"] / other.runs[seed]["peak_bytes"] for seed in self.runs.keys() & other.runs.keys())

    def at(self, end: int, field: str = "accuracies") -> Interval | None:
        """Before training (end 0), or after it (-1)."""
        return interval(run[field][end][1] for run in self.ended.values()) if self.ended else None

    def of(self, name: str) -> Interval | None:
        """Mean of what was measured on the first batch; None where there is nothing to measure."""
        values = [run[name] for run in self.runs.values() if run[name] is not None]
        return interval(values) if values else None

    def minus(self, other: "Group | None", field: str = "accuracies") -> Interval | None:
        """The final difference to another arm, seed by seed; None without a seed in common."""
        seeds = sorted(self.ended.keys() & other.ended.keys()) if other is not None and other is not self else []
        return interval(self.runs[seed][field][-1][1] - other.runs[seed][field][-1][1] for seed in seeds) if seeds else None


def groups_of(found: list[dict]) -> list[Group]:
    """The arms of the finals, in the order of their table."""
    finals = records.of(found, stage="final")
    return [_group(found, arm, own) for arm in FLAGS if (own := records.of(finals, arm=arm))]


def _group(found: list[dict], arm: str, own: list[dict]) -> Group:
    timed = records.of(found, arm=arm, timed=True)
    return Group(arm, {run["seed"]: run for run in own}, median(run["seconds_per_step"] for run in timed or own), bool(timed))


def named(groups: list[Group], arm: str) -> Group | None:
    return next((group for group in groups if group.arm == arm), None)


def sentences(groups: list[Group]) -> list[str]:
    """What the table says, in words that follow from its numbers."""
    return [*_learning(groups), *_failures(groups), *_against_adapters(groups), *_inverse(groups), *_seconds(groups)]


def _learning(groups: list[Group]) -> list[str]:
    full = named(groups, FULL)
    compared = [(group, d) for group in groups if (d := group.minus(full)) is not None and d.half is not None]
    words = {1: "Above", -1: "Below"}
    told = [
        f"{words[sign]} full fine-tuning by more than the interval: " + ", ".join(f"`{group.arm}` ({d.signed})" for group, d in some)
        for sign in words
        if (some := [(group, d) for group, d in compared if d.differs_from_zero and sign * d.mean > 0])
    ]
    within = [f"`{group.arm}`" for group, d in compared if not d.differs_from_zero]
    return [f"{text}." for text in told] + ([f"Within the interval of full fine-tuning: {', '.join(within)}."] if within else [])


def _failures(groups: list[Group]) -> list[str]:
    lost = [(group, len(group.runs) - len(group.ended)) for group in groups]
    diverged = [f"`{group.arm}` ({count} of {len(group.runs)} seeds)" for group, count in lost if count]
    still = [
        f"`{group.arm}` ({group.at(0)} to {group.at(-1)})"
        for group in groups
        if group.ended and group.at(-1).mean - group.at(0).mean < CHANCE_MARGIN
    ]
    return [
        *([f"Diverged: {', '.join(diverged)}."] if diverged else []),
        *([f"Learned next to nothing in so many steps: {', '.join(still)}."] if still else []),
    ]


def _against_adapters(groups: list[Group]) -> list[str]:
    """Reversible arms against the same adapters with ordinary gradients: accuracy and bytes."""
    plain = named(groups, ADAPTERS)
    told = [
        f"`{group.arm}` {group.share_of_bytes(plain):.0%} of the peak bytes at {d.signed} of accuracy"
        for group in groups
        if plain is not None and group.any_run["inverse_error"] is not None and (d := group.minus(plain)) is not None
    ]
    return [f"Against ordinary adapters: {'; '.join(told)}."] if told else []


def _inverse(groups: list[Group]) -> list[str]:
    found = [(group, group.of("state_change"), group.of("inverse_error")) for group in groups if group.of("inverse_error") is not None]
    told = [f"`{group.arm}` {change.mean:.2f} and {error.mean:.1g}" for group, change, error in found]
    text = (
        "On the first batch, the relative change of the last hidden states by the coupling, and the relative error of the input of the "
        f"first layer that backward rebuilds: {'; '.join(told)}."
    )
    return [text] if told else []


def _seconds(groups: list[Group]) -> list[str]:
    return [] if all(group.alone for group in groups) else ["Seconds marked * were measured while other work ran."]
