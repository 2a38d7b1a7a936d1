"""The tables of what was measured on a GPU."""

from methods import LOGIT_FREE, OFFLOADED
from pages import Rows, by, listing, of

NOT_RUN = "Not run on a GPU yet."
ENDED = {"memory": "", "seconds": ", or more: no time for a longer one", "trials": ", or more: not tried"}
COLUMNS = {
    "exactness": {
        "card": "{gpu}", "kernel": "{kernel}", "dtype": "{dtype}", "chunk": "{chunk} of {tokens}, by {order}{where}", "error of the gradient": "{error:.2e}",
        "of plain training": "{error_of_plain:.2e}", "within its bound": "{within}",
    },
    "step": {
        "card": "{gpu}", "model": "{model}", "tokens": "{tokens:,}", "method": "{method}", "seconds a step": "{seconds:.3f}",
        f"x {LOGIT_FREE}": "{relative:.2f}", "x not offloaded": "{of_offload:.2f}", "peak MiB": "{peak_bytes:mib}", "traced MiB": "{traced_bytes:mib}",
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
    return "\n\n".join(listing(lines, COLUMNS[part], "l" * len(COLUMNS[part])) for part, lines in found.items() if lines) or NOT_RUN


def _told(row: dict, rows: Rows) -> dict:
    """With what columns say that the file does not."""
    row = dict.fromkeys(MEASURED) | {"left_out": ""} | row
    within = row["left_out"] or ("yes" if row["exact"] else "**no**")
    ended = ENDED[row["ended_by"]] if "ended_by" in row else row["left_out"]
    compared = _compared(row, rows) if row["part"] == "step" else {}
    return row | {"where": ", offloaded" if row.get("offloaded") else "", "within": within, "ended": ended} | compared


def _compared(row: dict, rows: Rows) -> dict:
    """A step beside other methods on the same row: its seconds in theirs, and the bytes of its trace."""
    same = {name: row[name] for name in ("model", "tokens")}
    seconds = by([other for other in of(rows, part="step", gpu=row["gpu"], **same) if "seconds" in other], "method", "seconds")
    here = row["method"].removesuffix(OFFLOADED)
    others = {"relative": LOGIT_FREE, "of_offload": here if here != row["method"] else None}
    ratios = {name: row["seconds"] / seconds[other] if row["seconds"] and other in seconds else None for name, other in others.items()}
    return ratios | {"traced_bytes": by(of(rows, part="trace", **same), "method", "traced_bytes").get(row["method"])}
