"""From files or a hub name to tokenised rows, through `datasets`, which keeps the result on disk."""

from hf_memtune.cli.data.collating import collator
from hf_memtune.cli.data.kinds import check_columns, class_names, resolved
from hf_memtune.cli.data.making import IGNORED, instruction_row, text_row
from hf_memtune.cli.data.mapping import mapped
from hf_memtune.cli.data.reading import BUILDERS, load_rows
from hf_memtune.cli.data.rows import Rows, prepare, tokenised

__all__ = [
    "BUILDERS", "IGNORED", "Rows", "check_columns", "class_names", "collator", "instruction_row", "load_rows", "mapped", "prepare",
    "resolved", "text_row", "tokenised",
]  # fmt: skip
