"""The few-shot suite and its table, from end to end on a tiny model and a task of forty rows."""

import json
import warnings

import pytest

from hf_memtune.cli import train
from tests.support import scripts
from tests.support.folders import llama, write_rows
from tests.support.questions import task_folder

GROUP = "{group: both, task: [more, most], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}"  # as MMLU is one
ARMS, RATES = ("plain", "ours-0.3"), (1e-2, 1e-4)
RECIPE = """
model_name_or_path: model
dataset_name: rows.jsonl
eval_fraction: 0.25
token_seeking: true
preset: tokenseek
lora_r: 4
max_length: 64
max_steps: 4
per_device_train_batch_size: 4
learning_rate: 1
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run needs: a model, rows, a recipe and task files, of which one names rows that are not there."""
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("few_shot")
    llama(made / "model")
    rows = [{"instruction": f"name {n} colours", "output": "red green blue sun sea"} for n in ("one", "two", "three")]
    write_rows(made / "rows.jsonl", rows * 16)
    (made / "recipe.yaml").write_text(RECIPE)
    tasks = task_folder(made / "tasks", "mine", "more", "most", "lost")
    (tasks / "both.yaml").write_text(GROUP)
    (tasks / "lost.yaml").write_text((tasks / "lost.yaml").read_text().replace("rows.jsonl", "absent.jsonl"))
    return made


@pytest.fixture(autouse=True)
def without_pip(monkeypatch):
    """lm-eval asks pip what is installed, at every scoring."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def replicate(folder, *more: object):
    """The script on two arms and two learning rates."""
    given = ["--recipe", "recipe.yaml", "--arms", *ARMS, "--learning_rates", *RATES, "--seeds", "1", "--tasks_folder", "tasks"]
    tasks = ["--tasks", "mine", "both", "--num_fewshot", "2", "0", "--limit", "12", "--out", "few_shot.jsonl"]
    return scripts.run(scripts.FOLDER / "replicate_tokenseek.py", *given, *tasks, *more, cwd=folder)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "few_shot.jsonl").read_text().splitlines()]


def write(folder, rows: list[dict]) -> None:
    (folder / "few_shot.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if wanted.items() <= row.items()]


@pytest.fixture(scope="module")
def measured(folder):
    """The lines of a first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        done = replicate(folder)
    assert done.returncode == 0, done.stderr
    return lines_of(folder)


def test_every_arm_is_tuned_and_then_scored(measured):
    tuned, finals = of(measured, stage="tune"), of(measured, stage="final")
    assert [(row["arm"], row["learning_rate"]) for row in tuned] == [(arm, rate) for arm in ARMS for rate in RATES]
    assert [(row["arm"], row["seed"]) for row in finals] == [(arm, 1) for arm in ARMS]
    for row in measured:
        assert row["held_out_loss"] > 0 and row["peak_bytes"] > 0 and row["seconds_per_step"] > 0 and row["conditions"]["torch"]
        assert (0.2 < (row["kept_share"] or 0) < 0.5) == (row["arm"] != "plain")
        assert row["setup"]["max_steps"] == "4" and "preset" not in row["setup"]
    for row in finals:
        scores = row["scores"]
        assert list(scores) == ["mine", "both"] and all(0 <= each["score"] <= 1 and each["stderr"] > 0 for each in scores.values())
        assert row["mean"] == pytest.approx((scores["mine"]["score"] + scores["both"]["score"]) / 2)
        assert row["mean_stderr"] == pytest.approx((scores["mine"]["stderr"] ** 2 + scores["both"]["stderr"] ** 2) ** 0.5 / 2)
    assert not any(row["scores"] for row in tuned)


def test_finals_have_the_learning_rate_of_the_lowest_loss(folder, measured):
    """And where the losses are the other way round, the other one."""
    best = {}
    for arm in ARMS:
        losses = {row["held_out_loss"]: row["learning_rate"] for row in of(measured, stage="tune", arm=arm)}
        best[arm] = losses[min(losses)]
        assert len(losses) == 2 and [row["learning_rate"] for row in of(measured, stage="final", arm=arm)] == [best[arm]]
    write(folder, [row | {"held_out_loss": -row["held_out_loss"]} for row in of(measured, stage="tune")])
    assert replicate(folder, "--arms", "plain").returncode == 0
    (final,) = of(lines_of(folder), stage="final")
    assert final["learning_rate"] in RATES and final["learning_rate"] != best["plain"]


def test_a_search_that_diverged_is_told_of(folder, measured):
    """At one rate, which is not taken; and at all, where nothing is."""
    (best,) = {row["learning_rate"] for row in of(measured, stage="final", arm="plain")}
    lost = [row | {"held_out_loss": None} if row["learning_rate"] == best else row for row in of(measured, stage="tune", arm="plain")]
    run = of(measured, stage="final", arm="plain")[0]
    scripts.load("replicate_tokenseek")  # its folder is seen from here on
    from learning.few_shot import chosen_rate

    assert chosen_rate(measured, run) == best != chosen_rate(lost, run)
    write(folder, [row | {"held_out_loss": None} for row in lost])
    done = replicate(folder, "--arms", "plain")
    assert done.returncode == 1 and "Diverged at every learning rate" in done.stderr and len(lines_of(folder)) == 2


def test_what_is_measured_is_not_measured_again(folder, measured):
    write(folder, measured)
    assert replicate(folder).returncode == 0 and lines_of(folder) == measured


def test_with_other_files_a_final_is_another_run(folder, measured):
    """A task file and the rows that are learned, by content: neither changes its name."""
    write(folder, measured)
    for file in (folder / "tasks" / "more.yaml", folder / "rows.jsonl"):
        before, known = file.read_text(), len(lines_of(folder))
        file.write_text(before + "\n")
        try:
            assert replicate(folder, "--arms", "plain").returncode == 0
        finally:
            file.write_text(before)
        (again,) = lines_of(folder)[known:]
        assert again["stage"] == "final" and again["files"] not in [row["files"] for row in of(lines_of(folder)[:known], stage="final")]
    scripts.load("tables")
    import tables_few_shot

    assert tables_few_shot.few_shot(lines_of(folder)).count("| `plain` | 0.0") == 3  # a table each


@pytest.mark.parametrize("lost", [1, -1])
def test_a_lost_line_is_measured_again_alone(lost, folder, measured):
    """To the same numbers, but for the seconds; also one that a killed process left unfinished."""
    row = measured[lost]
    rest = [other for other in measured if other is not row]
    write(folder, rest)
    with open(folder / "few_shot.jsonl", "a") as file:
        file.write('{"stage": "tune", "ar')
    done = replicate(folder)
    assert done.returncode == 0, done.stderr
    *before, cut, again = (folder / "few_shot.jsonl").read_text().splitlines()
    assert [*map(json.loads, before)] == rest and cut.endswith('"ar')
    timeless = {name: value for name, value in row.items() if name != "seconds_per_step"}
    assert timeless.items() <= json.loads(again).items()


def test_a_run_that_fails_leaves_no_line(folder, measured, monkeypatch):
    """Nor one that is stopped while it is scored."""
    write(folder, measured[:-1])

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_memtune.cli.task_scores.scored", stopped)
    with pytest.raises(KeyboardInterrupt):
        replicate(folder)
    assert lines_of(folder) == measured[:-1]


def test_all_problems_at_once_before_anything_trains(folder, measured):
    write(folder, [])
    wrong = [
        "--arms",
        "plain",
        "best",
        "--tasks",
        "mine",
        "lost",
        "--num_fewshot",
        "1",
        "--learning_rates",
        "-1",
        "--seeds",
        "0",
        "--batch_size",
        "0",
    ]
    done = replicate(folder, *wrong, "--metric", "acc_norm", "f1")
    said = ["'best'", "tasks: lost: ", "num_fewshot: got 1", "got -1", "seeds: got 0", "batch_size: got 0"]
    assert done.returncode == 1 and [words for words in said if words not in done.stderr] == [] and lines_of(folder) == []
    done = replicate(folder, "--metric", "acc_norm", "acc", "--recipe", "absent.yaml")
    said = ["mine has no acc_norm, expected one of acc", "recipe: there is no file", "model_name_or_path", "dataset_name"]
    assert done.returncode == 1 and [words for words in said if words not in done.stderr] == [] and lines_of(folder) == []


def test_a_task_twice_would_have_one_score(folder, measured):
    """Of one number of examples, and nothing of the other."""
    write(folder, [])
    done = replicate(folder, "--tasks", "mine", "both", "mine", "--num_fewshot", "0", "0", "2")
    assert done.returncode == 1 and "tasks: got mine more than once" in done.stderr and lines_of(folder) == []


def test_scores_of_a_part_of_an_answer_have_its_name(tmp_path, monkeypatch):
    """As those of gsm8k: a name that no score has would be looked for in vain, after all was trained and scored."""
    pytest.importorskip("lm_eval")
    scripts.load("replicate_tokenseek")  # its folder is seen from here on
    from learning.few_shot import Task, problems_of, score

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tasks = llama(tmp_path / "model"), task_folder(tmp_path / "tasks", "cut", "more")
    (tasks / "both.yaml").write_text(GROUP.replace("more, most", "cut, more"))
    with open(tasks / "cut.yaml", "a") as file:
        file.write("filter_list: [{name: first, filter: [{function: take_first}]}]\n")
    (message,) = problems_of([Task("cut"), Task("cut", 0, "acc_first"), Task("more")], str(tasks), 3)
    assert message == "metric: cut has no acc, expected one of acc_first"
    assert 0 <= score(str(model), Task("cut", 0, "acc_first"), str(tasks), 3, 8)["score"] <= 1
    assert not problems_of([Task("both", 0, "acc_first"), Task("both")], str(tasks), 3)


def test_a_model_is_scored_in_the_dtype_of_the_recipe(tmp_path, monkeypatch):
    """What is stored in bfloat16 takes a CPU without units for it ten times as long."""
    pytest.importorskip("lm_eval")
    scripts.load("replicate_tokenseek")  # its folder is seen from here on
    seen: list[str] = []
    monkeypatch.setattr("hf_memtune.cli.task_scores.scored", lambda source, *_: seen.append(source.dtype) or {"results": {}})
    from learning.few_shot import Task, score

    for dtype in ({}, {"dtype": "float32"}):
        with pytest.raises(StopIteration):  # no scores were made
            score("out", Task("mine"), None, None, 8, **dtype)
    assert seen == ["auto", "float32"]


def test_a_recipe_sets_nothing_of_a_method_for_every_arm(folder, measured):
    """Or the arm `tokenseek` would be trained by other weights than those of TokenSeek, and called by its name."""
    write(folder, [])
    (folder / "weighed.yaml").write_text(RECIPE + "token_weight: dft\nreversible: centred\n")
    done = replicate(folder, "--recipe", "weighed.yaml")
    assert done.returncode == 1 and lines_of(folder) == []
    assert all(f"{name}: the recipe sets it for every arm" in done.stderr for name in ("token_weight", "reversible"))


def test_a_line_without_a_value_is_no_word(tmp_path):
    script, recipe = scripts.load("replicate_tokenseek"), tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: null\nwarmup_steps:\nlr_scheduler_type: linear\n")
    study = script.Study(script.parse("", "few_shot", ["--recipe", str(recipe)], **script.OPTIONS))
    assert study.setup["lr_scheduler_type"] == "linear" and not {"max_steps", "warmup_steps"} & study.setup.keys()


EXPECTED = {  # ratio, scorer, selection, pool, always kept (None: none, unless the top of random), schedule
    "random": (0.1, "random", "top", "all", "none", "step"),
    "tokentune": (0.1, "random", "top", "all", "first_last", "step"),
    "tokenseek": (0.1, "combined", "top", "all", "none", "once"),
    "ours-0.1": (0.1, "random", "sample", "labels", None, "step"),
    "ours-0.3": (0.3, "random", "sample", "labels", None, "step"),
}
OF_TOKENS = ("token_ratio", "token_scorer", "token_selection", "select_from", "always_keep", "seek_schedule")


def test_every_arm_is_what_its_name_says(folder, tmp_path, monkeypatch):
    """With the published recipe; and of the lines that are written none is without effect."""
    script, parsed = scripts.load("replicate_tokenseek"), {}
    study = script.Study(script.parse("", "few_shot", ["--model", str(folder / "model")], **script.OPTIONS))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* has no effect ")
        for arm in script.FEW_SHOT:
            recipe = study.recipe(study.run("tune", arm, 3e-4, 7), str(tmp_path))
            parsed[arm] = train.parse([recipe, "--use_cpu"]).training
    found = {arm: tuple(getattr(each, name) for name in OF_TOKENS) for arm, each in parsed.items() if each.token_seeking}
    assert found == EXPECTED and not parsed["plain"].streams and parsed["streaming"].sequence_chunk_size == 512
    for each in parsed.values():
        assert (each.learning_rate, each.seed, each.warmup_steps, each.weight_decay) == (3e-4, 7, 100, 0.01)
        assert each.per_device_train_batch_size * each.gradient_accumulation_steps == 32 and each.lr_scheduler_type == "cosine"


def test_the_suite_in_small_runs_from_the_folder_of_the_assets(tmp_path):
    """By the recipe and the task files that are kept for it, on rows with the same columns; each task is told from the others by its prompts."""
    pytest.importorskip("lm_eval")
    assets, kept = tmp_path / ".assets", scripts.FOLDER.parent / "configs" / "few_shot"
    for name in ("models", "data/alpaca", "data/mmlu", "data/boolq", "data/lambada"):
        (assets / name).mkdir(parents=True)
    llama(assets / "models" / "smollm2-135m-instruct")
    rows = {
        "alpaca/train": {"instruction": "name two colours", "input": "", "output": "red green blue sun sea"},
        "mmlu/test": {"question": "name a colour", "subject": "art", "choices": ["sea", "red", "sun", "film"], "answer": 1},
        "mmlu/dev": {"question": "name the sea", "subject": "art", "choices": ["blue", "red", "sun", "film"], "answer": 0},
        "boolq/validation": {"question": "is the sun red", "title": "sun", "answer": True, "passage": "the sun is red"},
        "lambada/test": {"text": "write about the sea and a red sun"},
    }
    for name, row in rows.items():
        write_rows(assets / "data" / f"{name}.jsonl", [row] * 40)
    given = [
        "--recipe",
        kept / "smollm2.yaml",
        "--tasks_folder",
        kept / "tasks",
        "--arms",
        "tokenseek",
        "--learning_rates",
        "1e-3",
        "--seeds",
        "1",
    ]
    tasks = ["--tasks", "mmlu_rows", "boolq_rows", "lambada_rows", "--num_fewshot", "1", "0", "0", "--limit", "5"]
    done = scripts.run(scripts.FOLDER / "replicate_tokenseek.py", *given, *tasks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tuned, final = map(json.loads, (tmp_path / "results" / "few_shot.jsonl").read_text().splitlines())
    assert tuned["stage"] == "tune" and final["steps"] == 30 and 0.05 < final["kept_share"] < 0.2
    assert {name: each["score"] in (0, 1) for name, each in final["scores"].items()} == dict.fromkeys(
        tasks[1:4], True
    )  # all rows are one row


def test_the_table_has_scores_errors_and_bytes(measured):
    scripts.load("tables")
    import tables_few_shot

    text = tables_few_shot.few_shot(measured)
    final = of(measured, stage="final", arm="plain")[0]
    cell = f"{100 * final['scores']['mine']['score']:.2f} ± {100 * final['scores']['mine']['stderr']:.2f}"
    (line,) = [line for line in text.splitlines() if line.startswith("| `plain` | 0.0")]
    assert cell in line and f"{final['peak_bytes'] / 2**20:,.0f}" in line and "mine, 2-shot acc" in text
    assert "52.13" in text and "Not measured yet" not in text
    assert tables_few_shot.few_shot([]).startswith("Not measured yet.") and "52.61" in tables_few_shot.few_shot([])
    other = [row if row["stage"] == "final" else row | {"held_out_loss": -row["held_out_loss"]} for row in measured]
    assert "| `plain` | 0.0" not in tables_few_shot.few_shot(other)  # a run at a rate that was not chosen is not shown
    older = [row | {"settings": {"token_ratio": "0.5"}, "seed": row["seed"] and row["seed"] + 1} for row in of(measured, arm="ours-0.3")]
    assert tables_few_shot.few_shot(older + measured) == text  # nor is one of an arm that was another then
