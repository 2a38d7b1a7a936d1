"""Pictures and pages about a run: which tokens were kept and why, and what each method cost.

* :class:`TokenMap`: one training instance, its token scores and the tokens that were kept.
* :func:`write_token_map_html`, :func:`write_token_map_png`: show token maps to a reader.
* :func:`write_scorer_comparison`: which tokens each of several scorers keeps of a data set, counted by :class:`ScorerShares`.
* :func:`write_comparison_html`, :func:`comparison_table`: methods side by side.
* :func:`write_memory_report_html`: where the memory of a training step went.

All functions take plain Python data. matplotlib (``pip install -e '.[viz]'``) is needed by
:func:`write_token_map_png` and :func:`write_comparison_html` and imported only when they run.
"""

from hf_memtune.visualization.comparison import comparison_table, write_comparison_html
from hf_memtune.visualization.html import write_token_map_html
from hf_memtune.visualization.memory_report import write_memory_report_html
from hf_memtune.visualization.picture import write_token_map_png
from hf_memtune.visualization.scorer_page import write_scorer_comparison
from hf_memtune.visualization.scorer_shares import ScorerShares
from hf_memtune.visualization.token_map import TokenMap

__all__ = [
    "ScorerShares",
    "TokenMap",
    "comparison_table",
    "write_comparison_html",
    "write_memory_report_html",
    "write_scorer_comparison",
    "write_token_map_html",
    "write_token_map_png",
]
