"""docs/reversible.md: programs run, commands parse, words hold; and the benchmarks that it is made by."""

import json
import re
import shlex

import pytest

from tests.support.folders import ROOT, llama, write_rows
from tests.support.readme import write_model
from tests.support.scripts import FOLDER, run

PAGE = ROOT / "docs" / "reversible.md"
RESULTS = ("start_point.jsonl", "reversible_memory.jsonl", "inverse.jsonl")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.S | re.M)


# -- the page ----------------------------------------------------------------------------------------------------------


PRELUDE = """
from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling
tok = AutoTokenizer.from_pretrained("my-model")
ds = load_dataset("json", data_files="texts.jsonl", split="train")
ds = ds.map(lambda row: tok(row["text"], truncation=True, max_length=1024), remove_columns=ds.column_names)
collator = DataCollatorForLanguageModeling(tok, mlm=False)
"""
AFTERWARDS = """
from pathlib import Path
assert {"reversible_adapters.safetensors", "reversible_config.json"} <= {path.name for path in Path("adapters").iterdir()}
assert not any("adapters" in name for name, _ in model.named_parameters())
"""


def test_the_programs_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # where there is a GPU, too
    write_model(tmp_path / "my-model")
    write_rows(tmp_path / "texts.jsonl", [{"text": " ".join(f"w{4 + (n + k) % 50}" for k in range(12 + n % 3))} for n in range(8)])
    program = tmp_path / "program.py"
    program.write_text("\n".join([PRELUDE, *blocks("python"), AFTERWARDS]))
    done = run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is_exact" in done.stdout or "inverse_error=0.0" in done.stdout


def test_the_commands_parse(tmp_path, monkeypatch):
    from hf_memtune.cli import evaluate, generate, train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parsed = [train.parse([*shlex.split(line)[2:], "--use_cpu", "true"]) for line in lines if line.split()[1] == "train"]
    assert len(parsed) == 5 and [line.split()[1] for line in lines[5:]] == ["evaluate", "generate"]
    assert evaluate.parse(shlex.split(lines[5])[2:]).model.reversible_adapters == "adapters"
    assert generate.parse(shlex.split(lines[6])[2:])[1].prompt == ["Name three colours."]
    assert [each.training.reversible for each in parsed[:3]] == ["centred", "meft1", "centred"]
    assert parsed[3].model.reversible_adapters == "adapters" and parsed[4].training.checkpoint_levels == 2


def test_the_text_names_what_the_results_hold():
    """Bounds that are stated in words."""
    held = {name: [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()] for name in RESULTS}
    assert all(row["inverse_error"] == 0 for row in held["inverse.jsonl"] if row["numerics"] == "exact")
    deep = [r for r in held["inverse.jsonl"] if r["numerics"] == "float" and r["layers"] >= 4 and "published" in r["coupling"]]
    assert all(not r["is_finite"] or r["inverse_error"] > 1 for r in deep if r["model"] == "smollm2" or r["dtype"] == "bfloat16")
    shapes = {name: [r for r in held["reversible_memory.jsonl"] if r["model"] == name] for name in ("RoBERTa-large", "OPT-1.3B")}
    for rows in shapes.values():
        full = next(r for r in rows if r["method"] == "full fine-tuning" and r["layers"] == 24)["peak_bytes"]
        coupled = [r["peak_bytes"] for r in rows if r["layers"] == 24 and r["method"].split()[0] in ("centred", "meft1", "meft2", "meft3")]
        assert len(coupled) == 9 and max(coupled) <= (1 - 0.84) * full


# -- the benchmarks, in small ------------------------------------------------------------------------------------------


def records(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def assets(tmp_path):
    (tmp_path / "models").mkdir()
    llama(tmp_path / "models" / "stories15M")
    (tmp_path / "data" / "alpaca").mkdir(parents=True)
    rows = [{"instruction": f"name {n} colours", "input": "", "output": "red green blue sun sea " * 3} for n in ("one", "two", "three")]
    write_rows(tmp_path / "data" / "alpaca" / "train.jsonl", rows)
    return tmp_path


def test_the_start_is_measured_and_what_is_done_is_not_done_again(assets):
    known = {"model": "stories15m", "data": "alpaca", "coupling": "centred", "factor": 0.25, "numerics": "exact", "output": None}
    known |= {"adapter_init_std": 0.0, "rows": 3, "tokens": 12, "state_change": {"mean": 9.0}}
    write_rows(assets / "start.jsonl", [known])
    command = [FOLDER / "bench_start_point.py", "--models", "stories15m", "--rows", "3", "--tokens", "12"]
    done = run(*command, "--assets", assets, "--out", assets / "start.jsonl", cwd=assets)
    assert done.returncode == 0, done.stderr
    found = records(assets / "start.jsonl")
    assert (
        len(found) == len({json.dumps(row | {"conditions": 0, "seconds": 0}) for row in found}) > 30
        and found[0] == known
        and sum(row["state_change"] == known["state_change"] for row in found) == 1
    )
    centred = {r["factor"]: r["state_change"]["mean"] for r in found[1:] if r["coupling"] == "centred" and not r["adapter_init_std"]}
    assert centred[1 / 4] > centred[1 / 8] > centred[1 / 16] > centred[1 / 32] > 0
    own = [row for row in found if row["data"] == "own samples" and row["factor"] == 0.1 and row["output"] is None]
    meft1, meft2, meft3 = (row["state_change"] for row in sorted(own, key=lambda row: row["coupling"]))
    assert meft1 == meft2 != meft3


def test_bytes_are_traced(tmp_path):
    command = [FOLDER / "bench_reversible_memory.py", "--models", "RoBERTa-large", "--layers", "2", "4", "--out", tmp_path / "bytes.jsonl"]
    done = run(*command, "--methods", "full fine-tuning", "centred float", "centred exact", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = {(row["method"], row["layers"]): row["kept_bytes"] for row in records(tmp_path / "bytes.jsonl")}
    elements = 32 * 512 * 1024
    assert kept["centred float", 2] == kept["centred float", 4]
    assert kept["centred exact", 4] - kept["centred exact", 2] == 2 * elements * 4 // 8
    assert kept["full fine-tuning", 4] - kept["full fine-tuning", 2] > 2 * elements * 30
