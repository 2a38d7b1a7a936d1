"""How near gradients are to the exact one, and what scores keep: tables from results/{estimator,scorers,skip,precision}.jsonl."""

import math
from collections.abc import Callable

from pages import UNMEASURED, Cell, Rows, by, conditions_of, listing, table, unique


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    return {
        "skip": lambda: skip_table(rows_of("skip")),
        "estimator": lambda: estimator_table(rows_of("estimator")),
        "scorers": lambda: scorer_table(rows_of("scorers")),
        "precision": lambda: precision_table(rows_of("precision")),
    }


def skip_table(rows: Rows) -> str:
    """Chunks left out of backward: how far from the gradient of all of them."""
    columns = {"tokens": "{arm}", "error": "{error:.3f}", "cosine": "{cosine:.3f}", "cosine of sums": "{cosine_of_sums:.3f}"}
    made = listing(rows, columns | {"tokens run": "{tokens_with_gradient:.2f}"})
    return "\n\n".join([made, *(f"{row['task']}. {conditions_of([row])}" for row in rows[:1])])


POINTS = ("beginning", "end")
BIAS_RANGE = "In brackets: the bias at two standard errors of its square below and above. Where there are none, these were not kept; 0.00 is then any mean of the square up to 0. 0.00 to 0.00: by chance the mean of the square is further below 0 than that."
UNSCALED = (
    "`true_gradient/top` sends the kept tokens' part of the gradient of all tokens as it is; the gradient of other highest scores is that of the "
    "mean over the kept tokens."
)


def estimator_table(rows: Rows) -> str:
    """Bias and noise of every way to choose tokens, before and after training; the least error at the end first, by ratio."""
    if not rows:
        return UNMEASURED
    found, lines = by(rows, "arm point"), []
    for arm in sorted(unique(rows, "arm"), key=lambda arm: (_ratio(arm), *(found.get((arm, p), {}).get("rms", 9) for p in POINTS[::-1]))):
        cells = [found.get((arm, point), {}) for point in POINTS]
        values = [shown for cell in cells for shown in (_two_digits(cell.get("rms")), _bias(cell), _two_digits(cell.get("cosine")))]
        known = next(cell for cell in cells if cell)
        lines.append([f"`{arm}`", f"{100 * known['kept']:.0f} %", *values])
    heads = ["arm", "kept", *(f"{name}, {point}" for point in POINTS for name in ("rms", "bias", "cosine"))]
    notes = [UNSCALED] * any(arm.startswith("true_gradient/top") for arm in unique(rows, "arm"))
    notes += [BIAS_RANGE] * any(row.get("bias_squared_error") is not None for row in rows)
    return "\n\n".join([table(heads, lines), *notes, f"{rows[0]['task']}. {conditions_of(rows)}"])


def _two_digits(value: float | None) -> str:
    return Cell().format("{0:.2f}", value)


def _bias(cell: dict) -> str:
    """With what two standard errors of its square leave open, of rows in which they are."""
    shown, error = _two_digits(cell.get("bias")), cell.get("bias_squared_error")
    if error is None:
        return shown
    low, high = (math.sqrt(max(0.0, cell["bias_squared"] + sign * 2 * error)) for sign in (-1, 1))
    return f"{shown} ({low:.2f} to {high:.2f})"


def _ratio(arm: str) -> float:
    """Per cent of the tokens that an arm is to keep; of one without a number, all of them."""
    number = arm.removesuffix("/labels").rpartition("/")[2].removesuffix("%")
    return float(number) if number.isdigit() else 100.0


def precision_table(rows: Rows) -> str:
    """Sums in bfloat16 and float32, by the tokens of a row and of a chunk."""
    columns = {"tokens": "{tokens}", "method": "{method}", "tokens of a chunk": "{chunk}", "sums": "{sums}", "error": "{error:.4f}"}
    columns["error of keys' and values' weights"] = "{error_of_keys_and_values:.4f}"
    return f"{listing(rows, columns, 'rlrl')}\n\n{conditions_of(rows)}"


def scorer_table(rows: Rows) -> str:
    """Of what each scorer keeps, the share with a label, at either end of the row, and of each kind of token; that of all tokens on top."""
    if not rows:
        return UNMEASURED
    lines = []
    for who, row in (("all tokens", rows[0]), *((row["scorer"], row) for row in rows)):
        role, position, kinds = (list(row["shares"][name][who].values()) for name in ("role", "position", "token class"))
        name = who if who == "all tokens" else f"`{who}`"
        lines.append([name, *(f"{100 * share:.0f} %" for share in (role[0], position[0], position[-1], *kinds))])
    heads = ["", "with a label", "first tenth of the row", "last tenth", *rows[0]["shares"]["token class"]["all tokens"]]
    first = rows[0]
    said = f"{first['task']}: {first['rows']} rows, {first['of']:,.0f} tokens, of which the {100 * first['ratio']:.0f} % with the highest scores in each row are kept."
    return "\n\n".join([table(heads, lines), f"{said} {conditions_of(rows)}"])
