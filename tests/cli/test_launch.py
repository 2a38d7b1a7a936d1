"""The scripts of the commands run under `accelerate launch`."""

import json

from tests.support import launched
from tests.support.folders import ROOT, in_new_process, write_rows
from tests.support.train import SHORT, arguments


def test_the_scripts_run_under_accelerate_launch(model, instructions, encoder, tmp_path):
    seeking = ["--token_seeking", "--token_ratio", "0.2", "--lora_r", "2", "--output_dir", "lm"]
    rows = [{"sentence": "a good film" if n % 2 else "a bad poem", "label": n % 2, "idx": n} for n in range(24)]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation")]
    recipe = [ROOT / "configs" / "glue" / "cola.yaml", "--reversible", "centred", "--model", encoder, "--output_dir", "glue"]
    recipe += ["--train_file", files[0], "--validation_file", files[1], "--max_length", "32", *SHORT]
    commands = [
        [ROOT / "scripts" / "train.py", *arguments(None, model, instructions, *seeking)],
        [ROOT / "scripts" / "train_glue.py", *recipe],
    ]
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", launched.__file__, "commands.json"]
    done = in_new_process(*launch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training finished") == 2 and "matthews correlation" in done.stdout
    assert (tmp_path / "lm" / "adapter_config.json").exists() and (tmp_path / "glue" / "summary.json").exists()
