"""The study of token seeking and its page, from end to end on a tiny model."""

import json

import pytest

from tests.support import scripts
from tests.support.folders import in_new_process, llama, write_rows
from tests.support.scripts import FOLDER, run
from tests.support.tiny_models import tiny_model

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


def test_rows_run_one_at_a_time_learn_the_same(assets, results, tmp_path):
    """With gradients of the whole batch: every loss is that of the arm; and some other number of rows at a time is no arm."""
    file = tmp_path / "quality.jsonl"
    file.write_text(results.read_text())
    options = ["--tasks", "stories-imdb", "--rows", "2", "--steps", "4", "--measured", "2", "--learning_rates", "0.01", "--seeds", "1"]
    pairs = {arm: f"{arm}@1" for arm in ("plain", "checkpointing", "streaming", "streaming+checkpointing")}
    arms = [name for pair in pairs.items() for name in pair]
    done = run(BENCH, "quality", "--stage", "screen", "--assets", assets, "--out", file, *options, "--arms", *arms, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    screened = records_of(file, "screen")
    for arm, one in pairs.items():
        whole, parts = screened[arm, 1], screened[one, 1]
        assert parts["losses"] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in whole["losses"]]
        assert whole["losses"] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in screened["plain", 1]["losses"]]
        assert parts["losses"][-1] != pytest.approx(whole["losses"][0], rel=1e-4)
        assert parts["peak_bytes"] != whole["peak_bytes"]  # they were run in another way
    for arm in ("plain@", "plain@0", "plain@some", "random/top/cut/10%@1"):
        assert arm in run(BENCH, "quality", "--stage", "tune", "--arms", arm, "--assets", assets, "--list", cwd=tmp_path).stderr


def test_streaming_with_checkpointing_goes_layer_by_layer():
    scripts.load("bench_learning")
    from learning.arms import settings_of
    from learning.quality import install

    for arm, both in (("streaming+checkpointing", True), ("streaming", False)):
        model = tiny_model("llama")
        with install(arm, model, settings_of(arm, 128)):
            assert model.is_gradient_checkpointing == both


def test_as_many_steps_as_fit_into_the_seconds_of_plain_training(assets, results, tmp_path):
    file = tmp_path / "quality.jsonl"
    timed = [{"stage": "time", "timed": True, "rows": 2, "steps": 8, "learning_rate": 1e-4, "seed": 0, "task": "stories-imdb"}]
    seconds = {"plain": 3.0, "combined/top/cut/10%": 1.0}
    timed = [timed[0] | {"arm": arm, "seconds_per_step": each, "peak_bytes": 1, "losses": []} for arm, each in seconds.items()]
    options = ["--tasks", "stories-imdb", "--rows", "2", "--steps", "4", "--seeds", "1", "2", "--arms", ARMS[3]]
    command = [BENCH, "quality", "--stage", "race", "--assets", assets, "--out", file, *options]
    file.write_text(results.read_text())
    assert "0 to run; 0 done; 2 wait" in run(*command, "--list", cwd=tmp_path).stdout
    file.write_text(results.read_text() + "".join(json.dumps(row) + "\n" for row in timed))
    assert run(*command, cwd=tmp_path).returncode == 0
    raced = records_of(file, "race")
    assert [(key, row["steps"], row["losses"][-1][0]) for key, row in raced.items()] == [((ARMS[3], 1), 12, 12), ((ARMS[3], 2), 12, 12)]
    assert raced[ARMS[3], 1]["learning_rate"] == records_of(file, "final")[ARMS[3], 1]["learning_rate"]
    tables = scripts.load("tables_races")
    race = tables.race_of([json.loads(line) for line in file.read_text().splitlines()], "stories-imdb")
    ended, text = records_of(file, "final"), tables.race_section(race)
    above = [raced[ARMS[3], seed]["losses"][-1][1] - ended["plain", seed]["losses"][-1][1] for seed in (1, 2)]
    (arm,) = [arm for arm in race if arm.group.arm == ARMS[3]]
    assert arm.same_seconds.mean == pytest.approx(sum(above) / 2) and arm.same_steps.mean != arm.same_seconds.mean
    assert (
        f"| {ARMS[3]} | 2 | 0 | 1.00 | {arm.same_steps:+} | 12 | {arm.same_seconds:+} |" in text
        and "| plain | 2 | 0 | 3.00 | +0.000 | 4 |" in text
    )


def final(arm: str, seed: int, loss: float | None, **changed) -> dict:
    """A record of a final; of loss None, of one that diverged."""
    run = {"stage": "final", "task": "stories-imdb", "arm": arm, "rows": 4, "steps": 4, "learning_rate": 0.1, "seed": seed}
    cost = {"timed": False, "seconds_per_step": 1.0, "peak_bytes": 2**20}
    return run | cost | {"losses": [[0, 3.0], [4, loss]], "diverged": loss is None, **changed}


def test_which_differences_are_clear_by_themselves_and_which_are_all_at_once():
    tables = scripts.load("tables_races")
    losses = {
        "random/top/cut/10%": (2.0, 2.0, 2.0),
        "combined/top/cut/10%": (
            2.19,
            2.29,
            2.39,
        ),  # five standard errors above: of two degrees of freedom 4.3 are enough, of three intervals 7.6
        "random/sample/cut/10%": (1.9, 2.0, 2.1),
        "random/sample/stream/10%": (0.9, 1.01, 1.09),
    }
    rows = [final(arm, seed, loss) for arm, each in losses.items() for seed, loss in enumerate(each, 1)]
    text = tables.pairs_table(rows)
    lines = {tuple(line.split(" | ")[2:4]): line for line in text.splitlines() if "`" in line}
    assert [line.rpartition(" | ")[2] for line in lines.values()] == ["yes |", "no |", "all |"]
    assert "2 of 3 are clear" in text and "(Bonferroni), 1 are" in text
    alone = tables.pairs_table([row for row in rows if "top" in row["arm"]])  # one interval holds at once with itself
    assert alone.splitlines()[2].endswith("| +0.290 ± 0.248 | all |") and "1 of 1 are clear" in alone


def test_what_a_mean_leaves_out_is_told():
    """Seeds that diverged, and seeds that were not run: under the finals, and under the race."""
    tables, races = scripts.load("tables_learning"), scripts.load("tables_races")
    rows = [final(arm, seed, 2.0 + seed) for arm in ("plain", "streaming", "random/top/cut/10%") for seed in (1, 2, 3)]
    less = [final("random/top/cut/10%", 3, None)], [final("combined/top/cut/10%", seed, 2.5) for seed in (1, 2)]
    told = (
        "Diverged, and in no mean: `random/top/cut/10%`, 4 rows (1 of 3 seeds). Of fewer than 3 seeds: `combined/top/cut/10%`, 4 rows (2)."
    )
    for found, said in ((rows, False), ([*rows[:-1], *less[0], *less[1]], True)):
        groups = tables.finals(found, "stories-imdb")
        raced = [races.Raced(groups[0], races.Interval(0.0, None), races.Interval(0.0, None), 4)]
        assert [told in " ".join(tables.quality_sentences(groups)), told in races.race_section(raced, groups)] == [said, said]


def test_what_is_called_a_preset_has_its_settings():
    """That of TokenSeek scores once, before training, for which the loop of the study has no place: so it is not called by the preset alone."""
    from hf_memtune import TokenSeekingConfig
    from hf_memtune.settings.presets import PRESETS

    tables = scripts.load("tables_learning")
    from learning.arms import settings_of

    def values(**settings) -> dict:
        config = TokenSeekingConfig(token_seeking=True, **settings)
        return {name: getattr(config, name) for name in PRESETS[None]}

    found = {title.strip("`").split()[1]: (title, arm) for title, (arm, *_) in tables.SUMMARY_ARMS.items() if "--preset" in title}
    assert set(found) == {"tokentune", "tokenseek"}
    for preset, (title, arm) in found.items():
        anew = {"seek_schedule": "step"} if "--seek_schedule step" in title else {}
        assert values(preset=preset, **anew) == values(**settings_of(arm, 128))
        assert (values(preset=preset) == values(**settings_of(arm, 128))) == (not anew)


def test_batches_of_another_size_race_against_plain_training_of_the_plan():
    """At a rate of their own, of that size; the exact ways at that of plain training. Seconds of batches of the plan say how many steps fit."""
    options = scripts.load("bench_learning").parse(["quality", "--stage", "race", "--tasks", "stories-imdb"])
    from learning import plans

    plan = next(plan for plan in plans.PLANS["quality"] if plan.task == "stories-imdb")
    assert {"streaming": 2, "random/sample/cut/10%": 12}.items() <= dict(plan.resized).items()
    common = {"task": "stories-imdb", "seed": 0, "steps": 50, "diverged": False}
    tuned = [
        common | {"stage": "tune", "arm": arm, "rows": rows, "learning_rate": rate, "losses": [[50, loss]], "timed": False}
        for arm, rows, rate, loss in (("plain", 2, 1e-3, 2.0), ("plain", 2, 2e-3, 1.0), ("plain", 4, 3e-3, 0.5))
    ]
    timed = [
        common
        | {"stage": "time", "arm": arm, "rows": rows, "learning_rate": 1e-4, "losses": [], "timed": True, "seconds_per_step": seconds}
        for arm, rows, seconds in (("plain", 4, 3.0), ("plain", 2, 1.2), ("streaming", 2, 1.5))
    ]
    cell = next(cell for cell in plans.cells("quality", options) if (cell.run.arm, cell.run.rows) == ("streaming", 2))
    (run,) = cell.runs([*tuned, *timed])
    assert (run.learning_rate, run.steps, run.rows) == (2e-3, 200, 2)  # 100 steps of 3 seconds; not of the 1.2 of batches of its own size
    assert cell.runs(tuned) == [] and cell.runs(timed) == []


def test_long_rows_are_long_and_chunks_grow_with_them(assets, tmp_path):
    """Texts too short for the task are no rows of it, and halves of a row are chunks."""
    folder = tmp_path / "assets"
    for part in ("data/movie_reviews", "models"):
        (folder / part).mkdir(parents=True)
    (folder / "models" / "smollm2-135m-instruct").symlink_to(assets / "models" / "stories15M")
    long, short = f"{TEXTS[0]} " * 150, f"{TEXTS[1]} " * 100  # characters: 4,950 and 4,200
    rows = [{"text": long if n % 4 == 0 else short} for n in range(64)]
    write_rows(folder / "data" / "movie_reviews" / "imdb.jsonl", rows)
    options = ["--rows", "2", "--steps", "3", "--measured", "1", "--learning_rates", "0.01", "--arms", "streaming", "random/sample/cut/10%"]
    file, stage = tmp_path / "quality.jsonl", ["quality", "--stage", "screen", "--tasks", "smollm2-imdb"]
    done = run(BENCH, *stage, "--assets", folder, "--out", file, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = records_of(file, "screen")
    assert found["streaming", 0]["settings"] == {"sequence_chunk_size": 512}
    for record in found.values():
        data = record["conditions"]
        assert (data["held_out_rows"], "texts of 4500 characters or more" in data["data"]) == (
            1,
            True,
        )  # a quarter of 16, a third for tuning


def test_an_arm_that_is_none_is_refused(assets, results):
    for arm in ("random/best/cut/10%", "best/top/cut/10%", "random/top/cut", "random/top/cut/some"):
        done = run(BENCH, "quality", "--stage", "tune", "--arms", arm, "--assets", assets, "--list", cwd=results.parent)
        assert done.returncode == 2 and arm in done.stderr


def test_any_arm_may_be_run(assets, results):
    """Also one that no plan names. What waits for its tuning is told."""
    options = ["--arms", "context/sample/skip/30%/labels", "--list", "--out", results, "--tasks", "stories-imdb"]
    tuned = run(BENCH, "quality", "--stage", "tune", *options, cwd=results.parent)
    assert "4 to run; 0 done; 0 wait" in tuned.stdout
    final = run(BENCH, "quality", "--stage", "final", *options, cwd=results.parent)
    assert "0 to run; 0 done; 3 wait" in final.stdout


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import pictures, store, tables_learning
from learning.groups import finals
rows = store.read(Path({results!r}))
made = tables_learning.sections(lambda name: rows)
Path("page.md").write_text(made["quality-stories-imdb"]() + made["quality-conditions"]())
Path("empty.md").write_text(made["quality-minilm-reviews"]())
pictures.draw_finals(finals(rows, "stories-imdb"), Path("picture.png"))
(*_, last) = (row for row in rows if row["stage"] == "final")
retuned = [{{**last, "learning_rate": 9.0}}]
(group,) = (group for group in finals(rows + retuned, "stories-imdb") if group.arm == last["arm"])
assert [*group.runs.values()] == retuned, "finals at a rate that was chosen before are others"
"""


def test_the_page_is_made_of_the_results(results, tmp_path):
    done = in_new_process("-c", PROGRAM.format(scripts=str(BENCH.parent), results=str(results)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.md").read_text()
    assert all(f"| {arm} |" in text for arm in ARMS) and (tmp_path / "picture.png").stat().st_size > 10_000
    assert (tmp_path / "empty.md").read_text() == "Not measured yet."
