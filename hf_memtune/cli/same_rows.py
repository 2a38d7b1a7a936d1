"""Which rows a run learns: their digests stand beside its checkpoints, so that a run which goes on with others says so."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from hf_memtune import files

ROWS = "rows.json"
_COLUMNS = ("input_ids", "labels")


def note_rows(trainer, resumed: str | bool | None) -> None:
    """Write down the rows of a run that begins, or that goes on in another folder; warn where one that is resumed has others."""
    if not trainer.is_world_process_zero():
        return
    now = {"train": _known(trainer.train_dataset), "held_out": _known(trainer.eval_dataset)}
    own = Path(trainer.args.output_dir, ROWS)
    file = Path(resumed).parent / ROWS if isinstance(resumed, str) else own
    then = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    if not resumed or not own.is_file():
        own.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(own, json.dumps(now, indent=1) + "\n")
    for name, words in (("train", "rows to train on"), ("held_out", "held-out rows")):
        if name in then and then[name] != now[name]:
            warnings.warn(
                f"resume_from_checkpoint: the {words} ({_counted(now[name])}) are others than those that this run began with ({_counted(then[name])}): "
                "which rows are passed over is then not which were learned, and rows that were learned may be held out. Resume with the same data and "
                "settings of data, or train the saved model in a run of its own.",
                stacklevel=3,
            )


def _counted(known: dict | None) -> str:
    return "none" if known is None else f"{known['rows']} of them"


def _known(rows: Any) -> dict[str, Any] | None:
    """How many there are, and a digest of their tokens and labels; of several sets, of all together."""
    if rows is None:
        return None
    sets = list(rows.values()) if isinstance(rows, dict) else [rows]
    digest = hashlib.blake2b(digest_size=16)
    for each in sets:
        for batch in each.with_format("arrow").iter(1000):
            for name in _COLUMNS:
                _add(digest, batch.column(name).combine_chunks())
    return {"rows": sum(map(len, sets)), "digest": digest.hexdigest()}


def _add(digest, column) -> None:
    import pyarrow

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        digest.update(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
        column = column.flatten()
    digest.update(column.to_numpy(zero_copy_only=False).tobytes())
