"""What `pip install -e .` gives without extras: it trains, every command runs, and what an extra is for says which."""

import json
import shlex

import pytest

from tests.support.folders import in_new_process, llama, write_rows

EXTRAS = ("bitsandbytes", "gguf", "matplotlib", "trl")
# A module that is None in sys.modules cannot be imported, and importlib finds no spec of it.
PROGRAM = """
import json, shlex, sys
sys.modules.update(dict.fromkeys({extras!r}))
from hf_memtune.cli import main
statuses = []
for line in {lines!r}:
    print("###", line, flush=True)
    print("###", line, file=sys.stderr, flush=True)
    statuses.append(main(shlex.split(line)))
open("statuses.json", "w").write(json.dumps(statuses))
"""
TRAIN = "train --model my-model --dataset texts.jsonl --max_steps 1 --use_cpu"
LINES = {
    f"{TRAIN} --lora_r 2 --sequence_chunk_size 4 --output_dir out": 0,
    f"{TRAIN} --token_seeking --output_dir seeking": 0,
    f"{TRAIN} --optim paged_adamw_8bit": 2,
    f"{TRAIN} --load_in_4bit --lora_r 2": 2,
    "tokens --model my-model --dataset texts.jsonl --out tokens.html": 0,
    "estimate --model my-model --sequence_length 8 --budget 1GiB": 0,
    "plan --model my-model --sequence_length 8 --budget 1GiB --per_device_train_batch_size 1 --token_seeking --lora_r 2": 0,
    "merge --model out --output_dir merged": 0,
    "evaluate --model merged --dataset texts.jsonl": 0,
    "generate --model merged --prompt add": 0,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The process in which all commands ran, and its folder."""
    folder = tmp_path_factory.mktemp("bare")
    llama(folder / "my-model")
    write_rows(folder / "texts.jsonl", [{"text": "red green blue sun sea write"}] * 8)
    found = in_new_process("-c", PROGRAM.format(extras=EXTRAS, lines=list(LINES)), cwd=folder)
    assert found.returncode == 0, found.stderr
    return found, folder


def said(text: str, line: str) -> str:
    return text.partition(f"### {line}\n")[2].partition("###")[0]


def test_every_command_runs(done):
    found, folder = done
    assert json.loads((folder / "statuses.json").read_text()) == list(LINES.values()), found.stderr
    assert (folder / "merged" / "model.safetensors").is_file()


def test_what_an_extra_is_for_says_which(done):
    found, folder = done
    refused = [line for line, status in LINES.items() if status]
    assert len(refused) == 2 and all("pip install -e '.[quantization]'" in said(found.stderr, line) for line in refused)
    tokens = next(line for line in LINES if line.startswith("tokens"))
    assert "pip install -e '.[viz]'" in said(found.stdout, tokens)
    assert (folder / "tokens.html").is_file() and not (folder / "tokens.png").exists()
    plan = next(line for line in LINES if shlex.split(line)[0] == "plan")
    assert "QLoRA, weights in 4 bits: -" in said(found.stderr, plan) and "token seeking, ratio 0.1: -" not in said(found.stderr, plan)
