"""The few-shot suite of TokenSeek, to be replicated: a model trained in several ways by `hf-memtune train`, and scored by lm-eval.

    python scripts/replicate_tokenseek.py                                      all of it, from the hub; for a GPU
    python scripts/replicate_tokenseek.py --arms plain tokenseek --seeds 1     a part; the rest may follow
    python scripts/replicate_tokenseek.py --model M --dataset rows.jsonl \\
        --tasks mine --num_fewshot 5 --tasks_folder tasks                      without the hub
    python scripts/tables.py                                                   the table of docs/evaluation.md

First every arm is trained at each learning rate (stage tune); then, at the rate that gave it the lowest held-out loss, with other seeds,
and these are scored (stage final). One line a run in results/few_shot.jsonl. What the file has is not run again, and a run that was killed
leaves no line: the script may be stopped and started at will. What an arm is: FEW_SHOT in scripts/learning/arms.py. All else of training is
in the recipe; with another recipe, on other tasks, or where a final has other files of rows or tasks, runs are other runs.
"""

import gc
import json
import math
import sys
from argparse import Namespace
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from conditions import conditions
from learning.arms import FEW_SHOT, OF_A_METHOD, check
from learning.few_shot import SUITE, TUNED_BY, chosen_rate, digests_of, problems_of, score, short_name, tasks_of, together
from options import one, parse, several
from pages import ROOT
from store import measure, read

MODEL, DATA = "model_name_or_path", "dataset_name"
ALWAYS = {"save_strategy": "no", "report_to": "none", "show_rows": "0"}
OPTIONS = {
    "recipe": one(ROOT / "configs" / "few_shot" / "tokenseek.yaml", "how to train, but for the method and what is named below"),
    "model": {"help": "folder, or name on the hub (default: of the recipe)"},
    "dataset": {"help": "file, folder, or name on the hub (default: of the recipe)"},
    "arms": several(FEW_SHOT, "ways to train"),
    "learning_rates": several((1e-4, 2e-4, 4e-4, 8e-4), "each arm chooses among them"),
    "seeds": one(3, "runs of each arm at its learning rate"),
    "tasks": several((task.name for task in SUITE), "of lm-eval"),
    "num_fewshot": {
        "type": int,
        "nargs": "+",
        "help": "examples before each question, a number a task (default: of the suite; 0 for others)",
    },
    "metric": {"nargs": "+", "help": "what counts, one a task (default: of the suite; acc for others)"},
    "tasks_folder": {"help": "folder of task files of one's own"},
    "limit": {"type": int, "help": "score the first rows of each task alone"},
    "batch_size": one(8, "rows at a time in scoring"),
}


def main(given: list[str] | None = None) -> None:
    options = parse(__doc__, "few_shot", given, **OPTIONS)
    study = Study(options)
    if problems := study.problems():
        sys.exit("\n".join(["error:", *(f"  - {problem}" for problem in problems)]))
    tuning = [study.run("tune", arm, rate, TUNED_BY) for arm in options.arms for rate in options.learning_rates]
    measure(options.out, tuning, study.measured, "Tuning")
    chosen = {arm: chosen_rate(read(options.out), study.run("final", arm)) for arm in options.arms}
    finals = [study.run("final", arm, rate, seed) for arm, rate in chosen.items() if rate for seed in range(1, options.seeds + 1)]
    measure(options.out, finals, study.measured, "Training and scoring")
    without = [arm for arm, rate in chosen.items() if rate is None]
    sys.exit(f"Diverged at every learning rate, so name lower ones: {', '.join(without)}." if without else 0)


class Study:
    """What the options ask for. setup: the lines of the recipe but for method, model, data, rate and seed; words, as in the file."""

    def __init__(self, options: Namespace):
        self.options = options
        text = options.recipe.read_text() if options.recipe.is_file() else "{}"
        typed = yaml.safe_load(text)  # a line without a value is one that is left out, and no word
        recipe = {name: value for name, value in yaml.load(text, yaml.BaseLoader).items() if typed[name] is not None}
        self.model, self.data = options.model or recipe.get(MODEL), options.dataset or recipe.get(DATA)
        self.setup = {name: value for name, value in recipe.items() if name not in (*OF_A_METHOD, MODEL, DATA, "learning_rate", "seed")}
        self.tasks, self.miscounted = tasks_of(options.tasks, options.num_fewshot, options.metric)

    def run(self, stage: str, arm: str, rate: float | None = None, seed: int | None = None) -> dict:
        """What tells a run from others, as the file has it. How it is scored belongs to finals alone."""
        files = digests_of(self.data, self.options.tasks_folder)
        scored = {"tasks": [list(task) for task in self.tasks], "limit": self.options.limit, "files": files} if stage == "final" else {}
        names = {name: short_name(given or "") for name, given in (("model", self.model), ("data", self.data))}
        run = {"stage": stage, "arm": arm, "learning_rate": rate, "seed": seed, **names, **scored}
        return run | {"setup": self.setup, "settings": FEW_SHOT[arm]}

    def recipe(self, run: dict, folder: str) -> str:
        """A file for `hf-memtune train`."""
        own = {MODEL: self.model, DATA: self.data, "output_dir": folder, "learning_rate": run["learning_rate"], "seed": run["seed"]}
        given = {name: str(value) for name, value in own.items() if value is not None}
        file = Path(folder, "recipe.yaml")
        file.write_text(yaml.safe_dump(run["setup"] | run["settings"] | given | ALWAYS))
        return str(file)

    def measured(self, run: dict) -> dict:
        """Train, and score a final. All that is kept is the record."""
        from hf_memtune.cli import main as hf_memtune

        how = self.options.tasks_folder, self.options.limit, self.options.batch_size, self.setup.get("dtype", "auto")
        free_memory()
        with TemporaryDirectory() as folder:
            if hf_memtune(["train", self.recipe(run, folder)]):
                sys.exit(f"{run['arm']} at {run['learning_rate']:g}, seed {run['seed']}: not trained, for the reason above.")
            summary = json.loads(Path(folder, "summary.json").read_text())
            free_memory()
            scores = {task.name: score(folder, task, *how) for task in self.tasks} if run["stage"] == "final" else {}
        loss, kept = summary["held_out_loss"][1], summary["tokens_kept"]
        return {
            "held_out_loss": loss if math.isfinite(loss) else None,
            "scores": scores,
            **together(scores),
            "kept_share": kept / summary["tokens_seen"] if kept else None,
            "peak_bytes": summary["peak_bytes"],
            "seconds_per_step": summary["step_seconds"],
            "steps": summary["steps"],
            "conditions": conditions(device=device_name(), lm_eval=version("lm_eval")),
        }

    def problems(self) -> list[str]:
        """Everything that can be known to be wrong before training: of numbers, arms, the settings of each, and tasks."""
        options, found = self.options, []
        if not options.recipe.is_file():
            found.append(f"recipe: there is no file {str(options.recipe)!r}")
        found += self.problems_of_recipe()
        found += [f"learning_rates: got {rate:g}, expected more than 0" for rate in options.learning_rates if rate <= 0]
        numbers = {"seeds": options.seeds, "batch_size": options.batch_size}
        found += [f"{name}: got {number}, expected 1 or more" for name, number in numbers.items() if number < 1]
        for arm in options.arms:
            found += self.problems_of_training(arm)
        return list(dict.fromkeys([*found, *self.miscounted, *problems_of(self.tasks, options.tasks_folder, options.limit)]))

    def problems_of_recipe(self) -> list[str]:
        """Lines of a method beside those that an arm replaces: every arm would train by them, and not as its name says."""
        from hf_memtune.settings.reversible import ReversibleConfig
        from hf_memtune.settings.seeking import TokenSeekingConfig

        of_methods = {each.name for kind in (TokenSeekingConfig, ReversibleConfig) for each in fields(kind)}
        return [
            f"{name}: the recipe sets it for every arm, which is then not what its name says. Leave it out"
            for name in self.setup
            if name in of_methods
        ]

    def problems_of_training(self, arm: str) -> list[str]:
        """Of an arm and its settings, which `hf-memtune train` reads. Nothing is loaded."""
        from hf_memtune.cli import train
        from hf_memtune.errors import ConfigError

        try:
            check("few_shot", arm)
            with TemporaryDirectory() as folder:
                data = train.parse([self.recipe(self.run("tune", arm, 1e-4, TUNED_BY), folder)]).data
        except ConfigError as error:
            return error.problems
        except ValueError as error:
            return [str(error)]
        held_out = data.eval_split is not None or data.eval_fraction
        return [] if held_out else ["eval_fraction: got 0, but learning rates are chosen by the loss of rows that are held out"]


def free_memory() -> None:
    """What the last run left must not be in the peak of the next."""
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
