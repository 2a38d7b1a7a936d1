"""Scores by lm-eval: equal to those worked out by hand, the model left as it was, and what is refused."""

import copy
import functools
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

from hf_memtune.errors import ConfigError  # noqa: E402
from hf_memtune.evaluation import harness_tasks  # noqa: E402
from hf_memtune.evaluation.harness import Score, logged, score, scores_of, table_of, write_results  # noqa: E402
from hf_memtune.evaluation.harness_tasks import load_tasks  # noqa: E402
from hf_memtune.methods.overrides import modes_kept  # noqa: E402
from tests.support.folders import llama, tokenizer  # noqa: E402
from tests.support.questions import questions, task_folder  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(llama(tmp_path_factory.mktemp("models") / "tiny")).train()


@pytest.fixture(autouse=True)
def own_cache_and_no_description_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it runs pip, which takes a second


@pytest.fixture
def only_own_tasks(monkeypatch):
    """lm-eval's own task files are not read: there are 15,000 of them."""
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", functools.partial(lm_eval_tasks.TaskManager, include_defaults=False))


@torch.no_grad()
def log_probability(model, words, prompt: str, answer: str) -> float:
    ids = torch.tensor([words(prompt + answer)["input_ids"]])
    start = len(words(prompt)["input_ids"])
    each = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return float(each[start - 1 :].sum())


def by_hand(model, words, rows: list[dict]) -> float:
    """Share of rows whose right answer is the likelier one."""
    model.eval()
    found = []
    for row in rows:
        first, second = (log_probability(model, words, f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2"))
        found.append(row["label"] == int(second > first))
    model.train()
    return sum(found) / len(found)


def test_scores_are_those_worked_out_by_hand(model, tmp_path):
    words, rows = tokenizer(), questions("piqa", 40, 1)
    expected = by_hand(model, words, rows)
    (found,) = scores_of(score(model, words, load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine"))))
    error = (expected * (1 - expected) / (len(rows) - 1)) ** 0.5
    assert found == Score("mine", "acc", "none", pytest.approx(expected), pytest.approx(error)) and 0 < expected < 1
    turned = [row | {"label": 1 - row["label"]} for row in rows]
    (other,) = scores_of(score(model, words, load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine", rows=turned))))
    assert other.value == pytest.approx(1 - expected) != found.value


def test_the_first_rows_and_examples_before_them(model, tmp_path):
    words, folder = tokenizer(), task_folder(tmp_path / "tasks", "mine")
    (found,) = scores_of(score(model, words, load_tasks(["mine"], folder), limit=7))
    assert found.value == pytest.approx(by_hand(model, words, questions("piqa", 40, 1)[:7]))
    results = score(model, words, load_tasks(["mine"], folder, num_fewshot=2), limit=7)
    assert results["n-shot"] == {"mine": 2} and results["n-samples"]["mine"]["effective"] == 7


def test_the_model_is_left_in_its_modes(model, tmp_path):
    model.model.layers[0].eval()
    before, names = [m.training for m in model.modules()], [id(p) for p in model.parameters()]
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    score(model, tokenizer(), load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine")), limit=2)
    hook.remove()
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2
    assert seen and not any(map(any, seen)) and [id(p) for p in model.parameters()] == names
    with pytest.raises(RuntimeError), modes_kept(model):  # an error on the way, too
        model.eval()
        raise RuntimeError
    assert [m.training for m in model.modules()] == before
    model.train()


def test_a_head_of_its_own_stays_its_own(model, tmp_path):
    """Whatever the config says: of a checkpoint that has both matrices transformers loads both, and lm-eval would put one in the other's place."""
    apart, tasks = copy.deepcopy(model), load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine"))
    apart.config.tie_word_embeddings = True
    head = apart.lm_head.weight
    found = scores_of(score(apart, tokenizer(), tasks))
    assert apart.lm_head.weight is head and found == scores_of(score(model, tokenizer(), tasks))
    apart.tie_weights()  # as ever, afterwards
    assert apart.lm_head.weight is apart.model.embed_tokens.weight
    assert found != scores_of(score(apart, tokenizer(), tasks))


@pytest.mark.parametrize(
    "more", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapters_on_a_tied_head(more, model, tmp_path):
    tied = copy.deepcopy(model)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    adapted = peft.get_peft_model(tied, peft.LoraConfig(r=2, **more))
    before = {name: id(p) for name, p in adapted.named_parameters()}
    assert score(adapted, tokenizer(), load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine")), limit=2)
    assert {name: id(p) for name, p in adapted.named_parameters()} == before


def test_the_tokenizer_is_left_without_padding(model, tmp_path):
    """lm-eval gives it a token for that, which would be saved with every checkpoint."""
    words = tokenizer()
    words.pad_token = None
    tasks, size = load_tasks(["mine"], task_folder(tmp_path / "tasks", "mine")), len(words)
    assert scores_of(score(model, words, tasks)) == scores_of(score(model, tokenizer(), tasks))
    assert words.pad_token is None and len(words) == size


def test_groups_are_scored_once_and_shown(model, tmp_path):
    folder = task_folder(tmp_path / "tasks", "mine", "yours")
    (folder / "both.yaml").write_text("group: both\ntask: [mine, yours]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    tasks = load_tasks(["both"], folder)
    assert [item.name for item in tasks.items] == ["both"] and tasks.names == ["mine", "yours"]
    results = score(model, tokenizer(), tasks, limit=4)
    found = scores_of(results)
    assert {each.task for each in found} == {"both", "mine", "yours"} and len({each.value for each in found}) == 1
    assert "|both" in table_of(results) and "|mine" not in table_of(results).partition("|Groups|")[2]
    written = json.loads(write_results(results, tmp_path / "scores.json").read_text())
    assert written["results"]["mine"]["acc,none"] == found[0].value


@pytest.mark.parametrize("member", ["theirs", "{task: theirs, num_fewshot: 1}", "{group: all_theirs}", "{group: inner, task: [theirs]}"])
def test_a_group_of_ones_own_may_name_tasks_of_lm_eval(member, tmp_path, monkeypatch):
    """Whose files are then read as well."""
    folder, others = task_folder(tmp_path / "tasks", "mine"), task_folder(tmp_path / "others", "theirs")
    (folder / "both.yaml").write_text(f"{{group: both, task: [mine, {member}]}}")
    (others / "all.yaml").write_text("{group: all_theirs, task: [theirs]}")
    manager, made = lm_eval_tasks.TaskManager, []

    def with_others(include_path, include_defaults=True):
        made.append(include_defaults)
        return manager(include_path=[*([others] if include_defaults else []), include_path], include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", with_others)
    assert load_tasks(["both"], folder).names == ["mine", "theirs"] and made == [False, True]
    assert load_tasks(["mine"], folder).names == ["mine"] and made == [False, True, False]


def test_names_in_the_logs():
    scores = [Score("a", "acc", "none", 0.5, 0.1), Score("a", "exact_match", "strict", 1.0, None)]
    assert logged(scores) == {"eval_a_acc": 0.5, "eval_a_acc_stderr": 0.1, "eval_a_exact_match_strict": 1.0}


# --- refusals


def problems(names, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_tasks(names, *args, **kwargs)
    return caught.value.problems


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness_tasks, "find_spec", lambda name: None)
    assert problems(["sciq"]) == ["tasks: lm-eval is not installed. pip install -e '.[eval]'."]


def test_names_that_are_unknown(tmp_path, only_own_tasks):
    folder = task_folder(tmp_path / "tasks", "mine", "yours")
    (folder / "broken.yaml").write_text("task: [\n")
    first, second = problems(["mine", "yors", "other"], folder)
    assert "'yors'" in first and "yours" in first and "'other'" in second and "lm-eval ls tasks" in second
    assert all("broken.yaml" in message and "mine.yaml" not in message for message in (first, second))


def test_folders_without_tasks(tmp_path):
    (tmp_path / "empty").mkdir()
    assert problems(["mine"], tmp_path / "absent") == [f"tasks_folder: {str(tmp_path / 'absent')!r} is not a folder."]
    (message,) = problems(["mine"], tmp_path / "empty")
    assert "holds no task file" in message


def test_rows_that_cannot_be_had_are_all_named(tmp_path):
    folder = task_folder(tmp_path / "tasks", "mine", "far", "gone", "odd")
    for name, old, new in (
        ("far", "dataset_path: json", "dataset_path: allenai/sciq"),
        ("gone", "rows.jsonl", "absent.jsonl"),
        ("odd", "[sol1, sol2]", "[nothing[0]]"),
    ):
        (folder / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text().replace(old, new))
    far, gone, odd = problems(["mine", "far", "gone", "odd"], folder)
    assert far.startswith("tasks: far") and "allenai/sciq" in far and "tasks_folder" in far
    assert gone.startswith("tasks: gone") and "absent.jsonl" in gone and "data_files" in gone
    assert odd.startswith("tasks: odd") and "nothing" in odd and "data_files" not in odd
    assert load_tasks(["mine"], folder).names == ["mine"]


def test_what_lm_eval_would_refuse_later_or_pass_over(tmp_path):
    folder = task_folder(tmp_path / "tasks", "mine", "fixed", "runs")
    for name, line in (("fixed", "num_fewshot: 0"), ("runs", "unsafe_code: true")):
        with open(folder / f"{name}.yaml", "a") as file:
            file.write(f"{line}\n")
    (message,) = problems(["fixed"], folder, num_fewshot=3)
    assert message.startswith("num_fewshot: has no effect") and "fixed" in message
    with pytest.warns(UserWarning, match="num_fewshot has no effect on fixed"):  # by whoever loads them: a command, or the callback
        assert load_tasks(["fixed", "mine"], folder, num_fewshot=3).fixed == ["fixed"]
    assert not load_tasks(["mine"], folder, num_fewshot=3).fixed
    assert "runs code" in problems(["runs"], folder)[0]
