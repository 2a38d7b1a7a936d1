"""What the tests of train share with others."""

import json

from tests.support.folders import ROOT

SHORT = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --use_cpu --disable_tqdm true".split()


def arguments(recipe: str | None, model, data, *more: str) -> list[str]:
    first = [] if recipe is None else [str(ROOT / "configs" / recipe)]
    return [*first, "--model", str(model), "--dataset", str(data), *SHORT, *more]


def summary(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "summary.json").read_text())


REVERSIBLE = ["--reversible", "centred", "--adapter_rank", "4", "--adapter_init_std", "0.2"]
