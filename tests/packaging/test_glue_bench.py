"""The study of reversible adapters and its page, from end to end on a tiny model."""

import json

import pytest

from tests.support.folders import bert, in_new_process, write_rows
from tests.support.scripts import FOLDER

ARMS = ["full", "adapters", "MEFT1 float", "centred exact"]
# One process for all: importing takes longer than these runs.
PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import bench_learning, pictures, store, tables_commands
results = Path("glue.jsonl")
common = ["--assets", {assets!r}, "--out", str(results), "--steps", "3", "--held_out_rows", "12", "--arms", *{arms!r}]
final = ["glue", "--stage", "final", *common, "--seeds", "1", "2"]
statuses = {{
    "unknown": bench_learning.main(["glue", "--stage", "tune", "--arms", "meft9", "--list"]),
    "no such task": bench_learning.main(["glue", "--stage", "tune", "--tasks", "mnli", "--list"]),
    "tune": bench_learning.main(["glue", "--stage", "tune", *common, "--learning_rates", "0.01"]),
    "final": bench_learning.main(final),
}}
before = results.read_text()
statuses["again"] = bench_learning.main(final) or int(results.read_text() != before)
rows = store.read(results)
made = tables_commands.sections(lambda name: rows)
Path("page.md").write_text("\\n\\n".join(made[name]() for name in ("glue-arms", "glue", "glue-conditions")))
pictures.draw_accuracy(tables_commands.groups_of(rows, tables_commands.FLAGS), Path("picture.png"))
Path("statuses.json").write_text(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a few arms were tuned and run, and a page was made of them."""
    made = tmp_path_factory.mktemp("glue")
    (made / "data" / "movie_reviews").mkdir(parents=True)
    (made / "models").mkdir()
    bert(made / "models" / "all-MiniLM-L6-v2")
    rows = [{"text": f"a {'good' if n % 2 else 'bad'} film about the sea", "label": n % 2} for n in range(60)]
    write_rows(made / "data" / "movie_reviews" / "rotten_tomatoes.jsonl", rows)
    done = in_new_process("-c", PROGRAM.format(scripts=str(FOLDER), assets=str(made), arms=ARMS), cwd=made)
    assert done.returncode == 0, done.stderr
    return made


def test_statuses(folder):
    """What is done is not run again, and an arm or a task that is none is refused."""
    statuses = json.loads((folder / "statuses.json").read_text())
    assert statuses == {"unknown": 2, "no such task": 2, "tune": 0, "final": 0, "again": 0}


def test_every_arm_trains_what_it_says(folder):
    lines = map(json.loads, (folder / "glue.jsonl").read_text().splitlines())
    found = {(r["arm"], r["seed"]): r for r in lines if r["stage"] == "final"}
    assert set(found) == {(arm, seed) for arm in ARMS for seed in (1, 2)}
    full, ordinary, meft, centred = (found[arm, 1] for arm in ARMS)
    assert full["trainable_parameters"] == full["parameters"]
    assert ordinary["trainable_parameters"] == centred["trainable_parameters"] < meft["trainable_parameters"] < full["parameters"]
    for row in found.values():
        assert row["losses"][0][1] != row["losses"][1][1] and row["peak_bytes"] > 0 and row["conditions"]["held_out_rows"] == 12
    assert centred["inverse_error"] == 0 < meft["inverse_error"] and ordinary["inverse_error"] is None


def test_the_page_has_every_arm_and_a_picture(folder):
    text = (folder / "page.md").read_text()
    assert all(f"\n| {arm} |" in text for arm in ARMS) and "Not measured" not in text
    assert (folder / "picture.png").stat().st_size > 10_000
