"""Rows mapped by functions of this package, with the result kept on disk for as long as their code stays as it is."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def mapped(rows, make: Callable, options: dict[str, Any], **how: Any):
    """rows.map(make, fn_kwargs=options, **how), which leaves only what is made, under the title `Tokenising`."""
    # `datasets` knows a function of a module by its name: rows that older code made would be taken for those of the code that is there now
    options = {"make": make, "options": options, "code": code_digest()}
    return rows.map(_made, fn_kwargs=options, remove_columns=rows.column_names, desc="Tokenising", **how)


def _made(*given: Any, make: Callable, options: dict[str, Any], code: str) -> dict:
    return make(*given, **options)  # code is there to be a part of the name under which the result is kept


def code_digest() -> str:
    """Of every file that rows are read and tokenised by."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([*here.glob("*.py"), *here.parent.glob("*_data.py")]):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()
