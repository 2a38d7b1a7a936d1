"""The tables of what was measured on a GPU."""

from methods import LOGIT_FREE
from pages import Rows, by, listing, of

NOT_RUN = "Not run on a GPU yet."
ENDED = {"memory": "", "seconds": ", or more: no time for a longer one", "trials": ", or more: not tried"}
COLUMNS = {
    "exactness": {
        "card": "{gpu}", "kernel": "{kernel}", "dtype": "{dtype}", "chunk": "{chunk} of {tokens}, by {order}", "error of the gradient": "{error:.2e}",
        "of plain training": "{error_of_plain:.2e}", "within its bound": "{within}",
    },
    "step": {
        "card": "{gpu}", "model": "{model}", "tokens": "{tokens:,}", "method": "{method}", "seconds a step": "{seconds:.3f}",
        f"x {LOGIT_FREE}": "{relative:.2f}", "peak MiB": "{peak_bytes:mib}", "traced MiB": "{traced_bytes:mib}",
        "MiB in host memory": "{host_bytes:mib}", "": "{left_out}",
    },
    "longest row": {
        "card": "{gpu}", "model": "{model}", "limited to": "{card}", "method": "{method}", "longest row, tokens": "{tokens:,}{ended}",
    },
}  # fmt: skip
MEASURED = (
    "error",
    "error_of_plain",
    "exact",
    "seconds",
    "peak_bytes",
    "traced_bytes",
    "host_bytes",
    "tokens",
)  # None: it ran out of memory


def tables(rows: Rows) -> str:
    """A table for every part of which there are lines."""
    found = {part: [_told(row, rows) for row in of(rows, part=part)] for part in COLUMNS}
    return "\n\n".join(listing(lines, COLUMNS[part], "l" * 10) for part, lines in found.items() if lines) or NOT_RUN


def _told(row: dict, rows: Rows) -> dict:
    """With what columns say that the file does not."""
    row = dict.fromkeys(MEASURED) | {"left_out": ""} | row
    same = of(rows, **{name: row.get(name) for name in ("part", "gpu", "model", "tokens")})
    base = by([other for other in same if "seconds" in other], "method", "seconds").get(LOGIT_FREE) if row["part"] == "step" else None
    within = row["left_out"] or ("yes" if row["exact"] else "**no**")
    ended = ENDED[row["ended_by"]] if "ended_by" in row else row["left_out"]
    return row | {"relative": base and row["seconds"] and row["seconds"] / base, "within": within, "ended": ended}
