"""scripts/bench_glue.py and its page, from end to end on a tiny model; and that the committed page is that of the results."""

import json

import pytest

from tests.support.folders import bert, in_new_process, write_rows
from tests.support.scripts import FOLDER, run

ARMS = ["full", "adapters", "MEFT1 float", "centred exact"]
SMALL = ["--steps", "3", "--tuning_rows", "8", "--test_rows", "12"]


def statuses_of(folder) -> dict[str, int]:
    """Everything that the two scripts are asked to do, in order."""
    results, docs = folder / "glue.jsonl", folder / "docs"
    common = ["--assets", folder, "--out", results, *SMALL, "--arms", *ARMS]
    page = ["--results", results, "--docs", docs]

    def status(script, *options):
        return run(FOLDER / f"{script}.py", *options, cwd=folder).returncode

    final = ("bench_glue", "--stage", "final", *common, "--seeds", "1", "2")
    statuses = {
        "unknown": status("bench_glue", "--stage", "tune", "--arms", "meft9", "--list"),
        "empty": status("glue_page", *page),
        "tune": status("bench_glue", "--stage", "tune", *common, "--learning_rates", "0.01"),
        "final": status(*final),
    }
    before = results.read_text()
    statuses["again"] = status(*final) or int(results.read_text() != before)
    statuses["page"], statuses["check"] = status("glue_page", *page), status("glue_page", *page, "--check")
    text = docs.joinpath("reversible-glue.md").read_text()
    docs.joinpath("reversible-glue.md").write_text(text + "a number by hand: 1")
    statuses["changed"] = status("glue_page", *page, "--check")
    docs.joinpath("reversible-glue.md").write_text(text)
    return statuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a few arms were tuned and run, and a page was made of them."""
    made = tmp_path_factory.mktemp("glue")
    (made / "data" / "movie_reviews").mkdir(parents=True)
    (made / "models").mkdir()
    bert(made / "models" / "all-MiniLM-L6-v2")
    rows = [{"text": f"a {'good' if n % 2 else 'bad'} film about the sea", "label": n % 2} for n in range(60)]
    write_rows(made / "data" / "movie_reviews" / "rotten_tomatoes.jsonl", rows)
    (made / "statuses.json").write_text(json.dumps(statuses_of(made)))
    return made


def test_statuses(folder):
    """What is done is not run again, an unknown arm and an empty file are refused, and a changed page is noticed."""
    statuses = json.loads((folder / "statuses.json").read_text())
    assert statuses == {"unknown": 2, "empty": 2, "tune": 0, "final": 0, "again": 0, "page": 0, "check": 0, "changed": 1}


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
    text = (folder / "docs" / "reversible-glue.md").read_text()
    assert all(f"\n| {arm} |" in text for arm in ARMS)
    assert (folder / "docs" / "images" / "reversible-glue.png").stat().st_size > 10_000


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    done = in_new_process(FOLDER / "glue_page.py", "--check", cwd=tmp_path)
    assert done.returncode == 0, "docs/reversible-glue.md is out of date: run python scripts/glue_page.py"
