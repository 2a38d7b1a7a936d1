"""`hf-memtune estimate`, `hf-memtune plan` and `train --memory_budget`: from a config alone to a recipe that trains."""

import json
import re
import shutil
from importlib.util import find_spec

import pytest
import yaml

from hf_memtune.cli import forecast, longest, main
from hf_memtune.cli.blank import is_without_weights
from hf_memtune.cli.budget import RoomArguments
from hf_memtune.cli.plan import OF_THE_COMMAND, PlanArguments, make_parser
from hf_memtune.cli.settings import recipe_first
from hf_memtune.cli.train import make_parser as train_parser
from hf_memtune.levers.table import least_offers
from hf_memtune.units import parse_bytes
from tests.support.folders import ROOT, llama, write_rows

SIZES = "vocab_size=64,hidden_size=64,intermediate_size=64,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"
OF_A_TYPE = ["--model", "llama", "--config_overrides", SIZES, "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "2"]


# of a plan, which traces every rung
FEW_RUNGS = "--lora_r 2 --load_in_4bit --activation_checkpointing --token_seeking --optim sgd".split()


def estimated(capsys, *arguments) -> dict:
    assert main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_config_is_enough(model, tmp_path, capsys):
    """No weights and no tokenizer: the folder has a config.json and nothing else; a model type with the same sizes needs no folder."""
    shutil.copy(model / "config.json", tmp_path)
    settings = ["--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "2", "--sequence_length", "64"]
    of_folder = estimated(capsys, "--model", tmp_path, *settings)
    of_type = estimated(capsys, *OF_A_TYPE, "--sequence_length", 64)
    assert of_folder["peak_bytes"] == of_type["peak_bytes"] > 0
    assert of_folder["conditions"]["tokens"] == 64
    longer = estimated(capsys, *OF_A_TYPE, "--sequence_length", 128)
    assert longer["peak_bytes"] > of_type["peak_bytes"]


@pytest.mark.parametrize("name", ["llama", "Llama-3.2-1B"])
def test_a_folder_goes_before_a_built_in_name(name, model, tmp_path, capsys, monkeypatch):
    """Training would load the folder, so it is what is predicted, and what a plan names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    settings = ["--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "2", "--sequence_length", "64"]
    expected = estimated(capsys, "--model", model, *settings)["peak_bytes"]
    small = ["--config_overrides", SIZES + ",pad_token_id=0"]  # sibling: a folder without a config is no model
    assert estimated(capsys, "--model", name, *settings, *small, "--lora_r", 1)["peak_bytes"] != expected and is_without_weights(name)
    shutil.copy(model / "config.json", tmp_path / name)
    assert estimated(capsys, "--model", name, *settings)["peak_bytes"] == expected
    planned(capsys, tmp_path / "plan.yaml", "--budget", "1GiB", "--model", name, *settings, *FEW_RUNGS)
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["model_name_or_path"] == name


def test_a_recipe_and_a_table(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora_r: 4\nsequence_chunk_size: 16\nmax_length: 32\n")
    assert main(["estimate", *OF_A_TYPE, "--config", str(recipe)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("context pass", "stored kv", "optimizer state", "peak:", "tokens 32"):
        assert words in said


def test_lines_of_a_recipe_without_effect_are_told_where_nothing_else_will_be_tried(tmp_path, recwarn):
    """A rung of a plan may give them one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora_alpha: 4\ntoken_ratio: 0.2\n")
    forecast.parse([str(recipe), *OF_A_TYPE, "--budget", "1GiB"], make_parser(), PlanArguments)
    assert not [each for each in recwarn if "has no effect" in str(each.message)]
    forecast.parse([str(recipe), *OF_A_TYPE], forecast.make_parser("estimate", RoomArguments), RoomArguments, as_given=True)
    told = [str(each.message).split()[0] for each in recwarn if "has no effect" in str(each.message)]
    assert told == ["lora_alpha", "token_ratio"]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--model", "no-such-model"], "no config in 'no-such-model'"),
        (["--model", "llama", "--config_overrides", "hidden=3"], "no config in 'llama'"),
        ([*OF_A_TYPE, "--sequence_length", "0"], "sequence_length: got 0"),
        ([*OF_A_TYPE, "--sequence_length", "5000"], "sequence_length: got 5000 tokens, but the model has positions for 2048"),
        ([*OF_A_TYPE, "--token_seeking", "--token_gradient", "skip"], "token_gradient: got 'skip'"),
        ([*OF_A_TYPE, "--lora_alpha", "4"], "lora_alpha has no effect with lora_r=0 (full fine-tuning). Leave it out."),
        ([*OF_A_TYPE, "--token_ratio", "0.2"], "token_ratio has no effect without token_seeking. Leave it out."),
    ],
)
def test_what_cannot_be_estimated_is_said(arguments, problem, capsys):
    assert main(["estimate", *arguments, "--use_cpu", "--report_to", "none"]) == 2
    assert problem in capsys.readouterr().err


def test_adapters_are_no_model_to_estimate(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my/base", "r": 8}))
    assert main(["estimate", "--model", str(tmp_path), "--use_cpu", "--report_to", "none"]) == 2
    assert "holds LoRA adapters (adapter_config.json), expected a model" in (said := capsys.readouterr().err)
    assert "--model my/base --lora_r 8" in said


def test_a_plan_that_cannot_be_written_is_refused_before_anything_is_traced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_memtune.cli.forecast.predict", pytest.fail)
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "a.yaml").mkdir()
    for out, why in ((tmp_path / "notes" / "plan.yaml", "notes' is no folder"), (tmp_path / "a.yaml", "a.yaml' is a folder")):
        assert why in planned(capsys, out, "--budget", "1GiB", *OF_A_TYPE, code=2)


def test_offloaded_keys_and_values_are_predicted_where_there_is_no_gpu(capsys):
    streamed = [*OF_A_TYPE, "--sequence_length", 128, "--sequence_chunk_size", 64]
    kept, moved = (estimated(capsys, *streamed, *more)["peak_bytes"] for more in ([], ["--kv_offload"]))
    assert moved < kept
    assert main(["estimate", *OF_A_TYPE, "--kv_offload"]) == 2
    assert "kv_offload: has no effect without sequence_chunk_size" in capsys.readouterr().err


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """With logits that are most of a step."""
    return llama(tmp_path_factory.mktemp("models") / "wordy-llama", vocabulary=4096)


def rows_file(folder):
    row = {"instruction": "name the colours", "output": "red green blue and one of the sun"}
    return write_rows(folder / "rows.jsonl", [row] * 8)


def planned(capsys, out, *arguments, code=0):
    assert main(["plan", "--out", str(out), "--json", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return json.loads(said.out.strip().splitlines()[-1]) if code == 0 else said.err


def test_a_plan_makes_each_model_once_and_it_serves_every_rung(tmp_path, capsys, monkeypatch):
    from hf_memtune.cli import blank

    made, make = [], blank.blank_trainable
    monkeypatch.setattr(blank, "blank_trainable", lambda *settings: made.append(settings[0].lora_r) or make(*settings))
    common = [*OF_A_TYPE[:-1], "1", "--sequence_length", "16", "--max_length", "16", *FEW_RUNGS]
    plan = planned(capsys, tmp_path / "plan.yaml", "--budget", "1GiB", *common)
    assert made == [2] and len(plan["rungs"]) == 2
    first, last = plan["rungs"]
    flags = [f"--{name}={value}" for name, value in last["changes"].items()]
    assert estimated(capsys, *common, *flags)["peak_bytes"] == last["peak_bytes"] != first["peak_bytes"]
    assert made == [2, 2]


def test_a_plan_of_sizes_alone_leaves_the_model_to_be_named(tmp_path, capsys):
    """Under a name that has a config and no weights nothing can be trained: the recipe is for whatever model has these sizes."""
    out = tmp_path / "plan.yaml"
    assert main(["plan", "--out", str(out), "--budget", "1GiB", *OF_A_TYPE, "--sequence_length", "16", *FEW_RUNGS]) == 0
    assert f"hf-memtune train {out} --model M --dataset D" in " ".join(capsys.readouterr().out.split())
    assert "model_name_or_path" not in yaml.safe_load(out.read_text())
    assert main(["train", str(out), "--dataset", str(rows_file(tmp_path))]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_a_plan_is_a_recipe_that_trains(wordy, tmp_path, capsys):
    """Between what the settings as given need and what the logit-free loss does: that one is chosen, and train runs what is written."""
    data = ["--dataset", rows_file(tmp_path), "--eval_fraction", 0, "--max_steps", 1, "--save_strategy", "no"]
    data += ["--output_dir", tmp_path / "out"]
    common = ["--model", wordy, "--use_cpu", "--report_to", "none", "--per_device_train_batch_size", 4, "--max_length", 16]
    as_given, fused = (estimated(capsys, *common, *more)["peak_bytes"] for more in ([], ["--sequence_chunk_size", 16]))
    assert fused < as_given
    plan = planned(capsys, tmp_path / "plan.yaml", "--budget", fused, "--allow_approximate", "no", *common, *data)
    assert plan["chosen"] == "logit-free loss" and plan["budget_bytes"] == fused
    chosen = {rung["rung"]: rung for rung in plan["rungs"]}["logit-free loss"]
    assert chosen["peak_bytes"] == fused and chosen["fits"]
    recipe = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert (
        recipe["model_name_or_path"] == str(wordy)
        and recipe["sequence_chunk_size"] == recipe["max_length"] == 16
        and not OF_THE_COMMAND & recipe.keys()
    )
    assert main(["train", str(tmp_path / "plan.yaml")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_plan_goes_over_what_was_given_under_another_name(tmp_path, capsys):
    """One setting has two names, of which a recipe would read the older one last."""
    given = tmp_path / "given.yaml"
    given.write_text("gradient_checkpointing: false\nsequence_chunk_size: 64\n")
    common = ["--config", given, *OF_A_TYPE, "--sequence_length", 64, "--max_length", 64]
    needed = [estimated(capsys, *common, *more)["peak_bytes"] for more in ([], ["--activation_checkpointing"])]
    plan = planned(capsys, tmp_path / "plan.yaml", "--budget", needed[1], "--eval_fraction", 0, *common)
    assert needed[1] < needed[0] and plan["chosen"] == "activation checkpointing"
    flags = ["--model", "llama", "--config_overrides", SIZES, "--sequence_length", 64]
    assert estimated(capsys, "--config", tmp_path / "plan.yaml", *flags)["peak_bytes"] <= needed[1]


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_rows_are_one(rows, capsys):
    """All rows of a batch follow one another in one, with a mask that keeps their parts apart."""
    common = [*OF_A_TYPE[:-1], rows, "--sequence_length", 64]
    packed = estimated(capsys, *common, "--packing")
    one = estimated(capsys, *OF_A_TYPE[:-1], 1, "--sequence_length", 64 * rows, "--padded", "true")
    assert packed["peak_bytes"] == one["peak_bytes"] and packed["conditions"]["tokens"] == 64 * rows
    assert packed["peak_bytes"] > estimated(capsys, *common, "--padded", "false")["peak_bytes"]


def test_optimizers_take_all_parameters_at_once_off_a_cpu(capsys):
    """Unless they are fused, as the default is."""
    common = [*OF_A_TYPE, "--sequence_length", 4, "--eval_fraction", 0]
    on_cpu = [word for word in common if word != "--use_cpu"], common
    for optim, differs in (("adamw_torch", True), ("adamw_torch_fused", False)):
        off, on = (estimated(capsys, *flags, "--optim", optim)["account"]["phases"][-1] for flags in on_cpu)
        assert off["phase"] == on["phase"] == "optimizer"
        assert (sum(off["by_category"].values()) > sum(on["by_category"].values())) is differs


def test_a_kernel_that_is_not_installed_is_said(capsys):
    if find_spec("flash_attn"):
        pytest.skip("it is installed here")
    assert main(["estimate", *OF_A_TYPE, "--attn_implementation", "flash_attention_2"]) == 2
    assert "attn_implementation: got 'flash_attention_2', which is not installed here" in capsys.readouterr().err
    assert main(["estimate", *OF_A_TYPE, "--attn_implementation", "sdpa"]) == 0


def test_of_reversible_layers_adapters_alone_are_trained(tmp_path, capsys):
    """A budget below weights and gradients of the whole model, which is never trained, leaves the settings as given in."""
    common = [*OF_A_TYPE[:-1], 1, "--sequence_length", 8, "--eval_fraction", 0, "--reversible", "centred"]
    needed = estimated(capsys, *common)
    weights = needed["account"]["phases"][0]["by_category"]["weights"]
    assert needed["peak_bytes"] < 2 * weights
    assert planned(capsys, tmp_path / "plan.yaml", "--budget", needed["peak_bytes"], *common)["chosen"] == "as given"


def test_what_the_commands_share_has_one_meaning():
    """Every setting of train is one of plan, with the same default, so that a plan predicts what train will do."""
    train, plan = ({action.dest: action.default for action in make()._actions} for make in (train_parser, make_parser))
    different = {name for name in train if plan.get(name) != train[name]}
    assert not different
    assert {"memory_budget", "sequence_length", "out"} <= plan.keys()


def test_a_budget_of_training_is_kept(wordy, tmp_path, capsys):
    common = ["--model", wordy, "--use_cpu", "--report_to", "none", "--max_length", 16, "--per_device_train_batch_size", 4]
    data = ["--dataset", rows_file(tmp_path), "--eval_fraction", 0, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    fused = estimated(capsys, *common, "--sequence_chunk_size", 16)["peak_bytes"]
    assert main(["train", "--memory_budget", str(fused), *map(str, [*common, *data])]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "chosen: logit-free loss (exact): sequence_chunk_size=16" in said
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_budget_that_nothing_fits_is_refused_with_what_would(model, tmp_path, capsys):
    common = ["--model", model, "--use_cpu", "--report_to", "none", "--sequence_length", 8, "--per_device_train_batch_size", 1]
    common += ["--lora_r", 2, "--load_in_4bit", "--activation_checkpointing"]
    said = planned(capsys, tmp_path / "plan.yaml", "--budget", "4KiB", *common, "--allow_approximate", "no", code=2)
    assert "got 4 KiB, and nothing fits: weights and their gradients alone need" in said and "allow_approximate" not in said
    assert not (tmp_path / "plan.yaml").exists()


def test_budgets_are_bytes(tmp_path, capsys):
    assert main(["plan", *OF_A_TYPE, "--budget", "much"]) == 2
    assert "memory_budget: not a number of bytes" in capsys.readouterr().err
    assert main(["plan", *OF_A_TYPE]) == 2
    assert "memory_budget: got nothing" in capsys.readouterr().err
    assert PlanArguments(memory_budget="8GiB").room.tensor_bytes == parse_bytes("8 GiB")


def test_a_recipe_may_stand_anywhere():
    assert recipe_first(["--model", "m", "--config", "r.yaml", "--lora_r", "4"]) == ["r.yaml", "--model", "m", "--lora_r", "4"]
    assert recipe_first(["r.yaml", "--model", "m"]) == ["r.yaml", "--model", "m"]


KINDS = ("hf-memtune estimate", "hf-memtune plan", "hf-memtune longest")


def test_the_commands_of_the_readme_are_commands():
    """Their settings are read, without running them; the model is one that is known without files."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(KINDS)]
    assert len(lines) == 3
    for line in lines:
        _, command, *arguments = line.split()
        more = PlanArguments if command == "plan" else RoomArguments
        settings = forecast.parse([*arguments, "--use_cpu"], forecast.make_parser(command, more), more)
        assert settings.model.dtype == "bfloat16" and settings.more.gpu == "rtx4090" and (settings.tokens == 2048 or command == "longest")


# -- verdicts, and how far things can grow -----------------------------------------------------------------------------


def test_an_estimate_ends_with_a_verdict(capsys):
    needed = estimated(capsys, *OF_A_TYPE, "--sequence_length", 64)["peak_bytes"]
    for budget, words in ((needed, "verdict: fits"), (needed - 1, "verdict: does not fit")):
        assert main(["estimate", *OF_A_TYPE, "--sequence_length", "64", "--budget", str(budget)]) == 0
        said = capsys.readouterr().out
        assert words in said and "next: " in said
        found = estimated(capsys, *OF_A_TYPE, "--sequence_length", 64, "--budget", budget)["verdict"]
        assert found == {"budget_bytes": budget, "fits": budget == needed}
    assert main(["estimate", *OF_A_TYPE, "--gpu", "rtx4090"]) == 0
    assert "rtx4090: 24 GiB less an allowance" in capsys.readouterr().out


def test_held_out_rows_are_counted_since_training_measures_them(capsys):
    one = [*OF_A_TYPE[:-1], 1, "--sequence_length", 64, "--sequence_chunk_size", 32, "--activation_checkpointing", "--lora_r", 2]
    with_default, given = (estimated(capsys, *one, *more) for more in ([], ["--per_device_eval_batch_size", 8]))
    none = estimated(capsys, *one, "--eval_fraction", 0)
    assert with_default["conditions"]["evaluation_rows"] == 1 and given["conditions"]["evaluation_rows"] == 8
    assert "evaluation_rows" not in none["conditions"]
    assert given["peak_bytes"] > max(with_default["peak_bytes"], none["peak_bytes"])
    assert main(["estimate", *map(str, one), "--per_device_eval_batch_size", "8", "--budget", str(given["peak_bytes"] - 1)]) == 0
    assert "next: per_device_eval_batch_size=4;" in capsys.readouterr().out


def test_a_verdict_on_training_names_what_makes_a_step_smaller(capsys):
    """Sibling: a smaller batch of evaluation would change nothing."""
    needed = estimated(capsys, *OF_A_TYPE, "--sequence_length", 64)
    assert main(["estimate", *OF_A_TYPE, "--sequence_length", "64", "--budget", str(needed["peak_bytes"] - 1)]) == 0
    said = capsys.readouterr().out
    assert "in evaluation" not in said and "eval" not in said.split("next: ")[1]


def test_where_what_is_there_in_any_case_is_too_much_a_verdict_makes_that_smaller(capsys):
    """Whatever is done about activations, weights, gradients and the optimizer's state stay."""
    needed = estimated(capsys, *OF_A_TYPE, "--sequence_length", 64, "--eval_fraction", 0)
    at_peak = next(phase["by_category"] for phase in needed["account"]["phases"] if phase["phase"] == needed["peak_phase"])
    weights, gradients, state = (at_peak[name] for name in ("weights", "gradients", "optimizer_state"))
    static = weights + gradients + state
    words = {needed["peak_bytes"] - 1: "sequence_chunk_size", static - 1: "optim=", static - state - 1: "LoRA (", weights - 1: "QLoRA"}
    for budget, word in words.items():
        assert main(["estimate", *OF_A_TYPE, "--sequence_length", "64", "--eval_fraction", "0", "--budget", str(budget)]) == 0
        assert capsys.readouterr().out.split("next: ")[1].startswith(word)
    assert main(["longest", *OF_A_TYPE, "--max_length", "64", "--eval_fraction", "0", "--budget", str(weights - 1)]) == 2
    assert "Next: QLoRA" in capsys.readouterr().err


def test_the_longest_row_and_the_largest_batch(capsys):
    one = [*OF_A_TYPE[:-2], "--per_device_train_batch_size", "1"]
    budget = estimated(capsys, *one, "--sequence_length", 256)["peak_bytes"]
    assert main(["longest", *one, "--sequence_length", "64", "--budget", str(budget)]) == 0
    said = capsys.readouterr().out
    assert "longest row, 1 row a micro-batch: 256 tokens" in said and "next: " in said
    rows = int(re.search(r"largest batch: (\d+) rows? of 64 tokens", said)[1])
    fits, beyond = (estimated(capsys, *OF_A_TYPE[:-1], n, "--sequence_length", 64)["peak_bytes"] for n in (rows, rows + 1))
    assert fits <= budget < beyond


def short_of(positions: int) -> list[str]:
    """A model with few positions: the traces of its longest rows are short."""
    return [*OF_A_TYPE[:3], f"{SIZES},max_position_embeddings={positions}", *OF_A_TYPE[4:-2], "--max_length", "32"]


@pytest.fixture
def two_rows_at_most(monkeypatch):
    monkeypatch.setattr(longest, "MOST_ROWS", 2)


@pytest.mark.usefixtures("two_rows_at_most")
def test_rows_shorter_than_a_chunk_are_found_too(capsys):
    """A chunk of more tokens than the model has positions for; and one of which a part alone fits."""
    few = [*short_of(192), "--sequence_chunk_size", "512"]
    fits = estimated(capsys, *few, "--per_device_train_batch_size", 1, "--sequence_length", 128)["peak_bytes"]
    for budget, size in ((2**30, 192), (fits, 128)):
        assert main(["longest", *few, "--budget", str(budget), "--json"]) == 0
        row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["row"]
        assert row["size"] == size and (row["bytes_beyond"] is None if size == 192 else row["bytes"] == fits < row["bytes_beyond"])


LEAST = ["--sequence_chunk_size", "16", "--activation_checkpointing", "--lora_r", "2"]


@pytest.mark.usefixtures("two_rows_at_most")
def test_the_batch_that_is_searched_for_is_not_what_makes_it_larger(capsys):
    """Where it is the next thing to change, as the sibling shows, of an estimate, whose batch is fixed."""
    settings = [*short_of(32), *LEAST, "--eval_fraction", "0"]
    run = forecast.run_of(forecast.parse(settings, forecast.make_parser("longest", RoomArguments), RoomArguments))
    assert "per_device_train_batch_size" in str(least_offers(run)[0])
    assert main(["longest", *settings, "--budget", short_of_the_longest(capsys, *settings)]) == 0
    said = capsys.readouterr().out
    assert "next: " in said and " larger." in said and "per_device_train_batch_size" not in said


def short_of_the_longest(capsys, *settings: str) -> str:
    """A budget for a row of half as many tokens as the model has positions for."""
    positions = int(settings[3].rpartition("=")[2])
    return str(estimated(capsys, *settings, "--per_device_train_batch_size", 1, "--sequence_length", positions // 2)["peak_bytes"])


@pytest.mark.usefixtures("two_rows_at_most")
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--per_device_eval_batch_size", "8"], "next: per_device_eval_batch_size=4 makes rows longer"),
        (["--eval_fraction", "0"], " makes both larger"),
    ],
)
def test_where_evaluation_needs_most_it_is_what_makes_rows_longer(flags, words, capsys):
    settings = [*short_of(64), "--sequence_chunk_size", "32", *LEAST[2:], *flags]
    assert main(["longest", *settings, "--budget", short_of_the_longest(capsys, *settings)]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("most_rows, words", [(2, "next: nothing: memory limits neither."), (1024, " makes batches larger.")])
def test_what_memory_does_not_limit_nothing_makes_larger(most_rows, words, capsys, monkeypatch):
    """Rows end with the positions of the model."""
    monkeypatch.setattr(longest, "MOST_ROWS", most_rows)
    settings = [*short_of(32), *LEAST, "--eval_fraction", "0"]
    assert main(["longest", *settings, "--budget", "60MiB"]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["longest", *OF_A_TYPE], "memory_budget: got nothing"),
        (["longest", *OF_A_TYPE, "--budget", "1KiB"], "of which a row of 64 tokens already needs"),
        (["estimate", *OF_A_TYPE, "--gpu", "abacus"], "gpu: got 'abacus', expected one of"),
        (["estimate", *OF_A_TYPE, "--gpu", "t4", "--budget", "8GiB"], "gpu: got t4 with memory_budget=8GiB"),
    ],
)
def test_memory_that_is_not_said_or_not_enough(arguments, problem, capsys):
    assert main(arguments) == 2
    assert problem in capsys.readouterr().err
