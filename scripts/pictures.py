"""What all pictures of docs/ have in common: no display, one style, files that are the same bytes from the same numbers."""

from pathlib import Path

import matplotlib

from hf_memtune.files import whole

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  the backend is chosen first: there may be no display

MIB, GIB = 2**20, 2**30
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9, "legend.frameon": False,
}  # fmt: skip


def save(figure, file: Path, dpi: int = 110) -> None:
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=dpi, metadata={"Software": None})
    pyplot.close(figure)
