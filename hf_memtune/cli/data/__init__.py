"""From files or a hub name to tokenised rows, through `datasets`, which keeps the result on disk."""

from hf_memtune.cli.data.collating import check_packing, collator
from hf_memtune.cli.data.making import IGNORED, ending_of, instruction_row, opened, text_row
from hf_memtune.cli.data.mapping import mapped
from hf_memtune.cli.data.reading import BUILDERS, load_rows
from hf_memtune.cli.data.rows import Rows, prepare, tokenised, understood

__all__ = [
    "BUILDERS", "IGNORED", "Rows", "check_packing", "collator", "ending_of", "instruction_row", "load_rows", "mapped", "opened", "prepare",
    "text_row", "tokenised", "understood",
]  # fmt: skip
