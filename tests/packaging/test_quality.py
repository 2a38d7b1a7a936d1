"""The study of token seeking and its page, from end to end on a tiny model."""

import json

import pytest

from tests.support.folders import in_new_process, llama, write_rows
from tests.support.scripts import FOLDER, run

BENCH = FOLDER / "bench_learning.py"
ARMS = ("plain", "streaming", "random/sample/stream/10%", "combined/top/cut/10%")
TEXTS = ["write about the sea and a red sun", "name three colours of the numbers one two", "a good film is a poem about blue sea"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """What the task stories-imdb reads, in small."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "data" / "movie_reviews").mkdir(parents=True)
    (folder / "models").mkdir()
    llama(folder / "models" / "stories15M")
    write_rows(folder / "data" / "movie_reviews" / "imdb.jsonl", [{"text": f"{TEXTS[n % 3]} {TEXTS[n % 2]}"} for n in range(40)])
    return folder


@pytest.fixture(scope="module")
def results(assets, tmp_path_factory):
    """Tuned and final runs of a few arms."""
    file = tmp_path_factory.mktemp("results") / "quality.jsonl"
    for stage in ("tune", "final"):
        done = bench(assets, file, stage)
        assert done.returncode == 0, done.stderr
    return file


def bench(assets, file, stage: str, *more: str):
    rates = ["--learning_rates", "0.001", "0.01"] if stage == "tune" else ["--seeds", "1", "2"]
    arms = [arm for arm in ARMS if (stage, arm) != ("tune", "streaming")]  # it takes the rate of plain
    options = ["--tasks", "stories-imdb", "--rows", "2", "--steps", "4", "--measured", "2", "--arms", *arms, *rates, *more]
    return run(BENCH, "quality", "--stage", stage, "--assets", assets, "--out", file, *options, cwd=file.parent)


def records_of(file, stage: str) -> dict:
    return {(r["arm"], r["seed"]): r for r in map(json.loads, file.read_text().splitlines()) if r["stage"] == stage}


def test_every_arm_is_run_and_streaming_is_plain(results):
    final = records_of(results, "final")
    assert set(final) == {(arm, seed) for arm in ARMS for seed in (1, 2)}
    for seed in (1, 2):
        plain, streamed = (final[arm, seed]["losses"] for arm in ARMS[:2])
        assert streamed == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in plain]
        assert final[ARMS[3], seed]["losses"][1:] != [[step, pytest.approx(loss, rel=1e-4)] for step, loss in plain[1:]]


def test_what_is_done_is_not_run_again(assets, results):
    before = results.read_text()
    done = bench(assets, results, "final")
    assert done.returncode == 0 and results.read_text() == before


def test_an_arm_that_is_none_is_refused(assets, results):
    for arm in ("random/best/cut/10%", "best/top/cut/10%", "random/top/cut", "random/top/cut/some"):
        done = run(BENCH, "quality", "--stage", "tune", "--arms", arm, "--assets", assets, "--list", cwd=results.parent)
        assert done.returncode == 2 and arm in done.stderr


def test_any_arm_may_be_run(assets, results):
    """Also one that no plan names. What waits for its tuning is told."""
    options = ["--arms", "context/sample/skip/30%/labels", "--list", "--out", results, "--tasks", "stories-imdb"]
    tuned = run(BENCH, "quality", "--stage", "tune", *options, cwd=results.parent)
    assert "3 to run; 0 done; 0 wait" in tuned.stdout
    final = run(BENCH, "quality", "--stage", "final", *options, cwd=results.parent)
    assert "0 to run; 0 done; 3 wait" in final.stdout


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import pictures, store, tables_learning
rows = store.read(Path({results!r}))
made = tables_learning.sections(lambda name: rows)
Path("page.md").write_text(made["quality-stories-imdb"]() + made["quality-conditions"]())
Path("empty.md").write_text(made["quality-minilm-reviews"]())
pictures.draw_finals(tables_learning.finals(rows, "stories-imdb"), Path("picture.png"))
"""


def test_the_page_is_made_of_the_results(results, tmp_path):
    done = in_new_process("-c", PROGRAM.format(scripts=str(BENCH.parent), results=str(results)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.md").read_text()
    assert all(f"| {arm} |" in text for arm in ARMS) and (tmp_path / "picture.png").stat().st_size > 10_000
    assert (tmp_path / "empty.md").read_text() == "Not measured yet."
