"""The screening of many ways to choose tokens, and what each choice does by itself; from results/quality.jsonl."""

import math
from collections.abc import Callable

from learning.arms import TOKENTUNE, is_seeking, parts_of
from learning.groups import interval
from learning.plans import final_loss
from pages import Rows, listing, of, table, unique

MARGIN = 0.02  # of loss: a difference below it between two single runs is taken for noise
SAME_BYTES = 1.02  # as many bytes, to within what padding of the traced batch does


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    return {"quality-screening": lambda: screening_section(screened(rows_of("quality")))}


def screened(found: Rows) -> Rows:
    """The run of every screened arm at its best rate, best first within a batch size. reasons: why it was left out, none where kept."""
    runs = of(found, stage="screen")
    best = [min(of(runs, task=task, rows=rows, arm=arm), key=final_loss) for task, rows, arm in unique(runs, "task rows arm")]
    best = [run | {"loss": final_loss(run)} for run in best]
    return sorted(
        (run | {"reasons": _reasons(run, of(best, rows=run["rows"]))} for run in best), key=lambda run: (run["rows"], run["loss"])
    )


def _reasons(run: dict, runs: Rows) -> list[str]:
    """Against random tokens (TokenTune) of the same ratio, and against the best that needs no more bytes."""
    if not is_seeking(run["arm"]):
        return []
    others = [other for other in runs if is_seeking(other["arm"]) and other is not run and other["arm"] != run["arm"]]
    against = [(other, "") for other in others if other["arm"] == f"{TOKENTUNE}/{parts_of(run['arm'])[3]}"]
    lighter = [other for other in others if other["peak_bytes"] <= SAME_BYTES * run["peak_bytes"]]
    if lighter and (least := min(lighter, key=final_loss)) not in (other for other, _ in against):
        against.append((least, ", which needs no more bytes"))
    return [f"{run['loss'] - o['loss']:.3f} above {o['arm']}{why}" for o, why in against if run["loss"] > o["loss"] + MARGIN]


def screening_section(runs: Rows) -> str:
    """All arms, what speaks against each, and what each choice does by itself."""
    counted = f"{len(runs)} arms, {sum(bool(run['reasons']) for run in runs)} screened out; a difference counts from {MARGIN:g} of loss."
    told = [run | {"reasons": "; ".join(run["reasons"]) or "no"} for run in runs]
    columns = {"rows": "{rows}", "arm": "{arm}", "rate": "{learning_rate:g}", "loss": "{loss:.3f}", "peak MiB": "{peak_bytes:mib}"}
    choices = table("choice | against | pairs of arms | change of the loss, ± over pairs", effects(runs), "ll")
    return "\n\n".join([counted, choices, listing(told, columns | {"screened out": "{reasons}"}, "rlrrrl")])


REFERENCES = {"scorer": "random", "selection": "top", "gradient": "cut", "ratio": "10%"}  # in the order in which an arm names them


def effects(runs: Rows) -> list[list]:
    """What one choice does when all others stay: the mean difference over pairs of arms that differ in it alone, of one seed each.

    Pairs have arms in common, so that their interval says how far pairs differ, and not what another seed would give.
    """
    losses = {(run["rows"], *parts_of(run["arm"])): run["loss"] for run in runs if is_seeking(run["arm"]) and math.isfinite(run["loss"])}
    lines = []
    for place, (factor, reference) in enumerate(REFERENCES.items(), start=1):
        for value in dict.fromkeys(arm[place] for arm in losses if arm[place] != reference):
            twins = [(arm, (*arm[:place], reference, *arm[place + 1 :])) for arm in losses if arm[place] == value]
            pairs = [losses[arm] - losses[twin] for arm, twin in twins if twin in losses]
            if pairs:
                lines.append([f"{factor} {value}", reference, len(pairs), f"{interval(pairs):+}"])
    return lines
