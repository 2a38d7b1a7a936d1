"""One run of the study `glue`: reversible adapters against full fine-tuning, LoRA and ordinary adapters, by `hf-memtune glue`."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from learning.arms import ADAPTERS, FLAGS, RANK
from learning.commands import CommandBench, in_parts
from learning.plans import Run
from learning.tasks import require

MODEL, DATA, MAX_LENGTH = "models/all-MiniLM-L6-v2", "data/movie_reviews/rotten_tomatoes.jsonl", 64
HELD_OUT = {"tuning": 256, "test": 768}  # of rows shuffled by a seed of their own
ALWAYS = f"--per_device_eval_batch_size 32 --sentence_column text --max_length {MAX_LENGTH}".split()


class Bench(CommandBench):
    """What the runs share: the rows, as one file a part. Raises FileNotFoundError where the model or the rows are not there."""

    def __init__(self, options):
        import datasets

        super().__init__(options)
        require(options.assets, MODEL, DATA, "minilm movie_reviews")
        self.folder = tempfile.TemporaryDirectory()
        rows = datasets.load_dataset("json", data_files=str(options.assets / DATA), split="train")
        self.files = in_parts(rows, HELD_OUT, options.held_out_rows, lambda row: len(row["text"]), Path(self.folder.name))

    def command(self):
        from hf_memtune.cli import glue

        return glue

    def arguments(self, run: Run) -> dict:
        files = {"train_file": self.files["train"], "validation_file": self.files[run.held_out]}
        return {"model": self.options.assets / MODEL, **files}

    def flags(self, run: Run) -> tuple[str, ...]:
        return (*ALWAYS, *FLAGS[run.arm])

    def described(self, run: Run) -> dict[str, str]:
        return {
            "model": f"{Path(MODEL).name}, float32, dropout as its configuration says",
            "data": f"{DATA.removeprefix('data/')}, one class a row, rows of {MAX_LENGTH} tokens at most",
        }

    def measure(self, run: Run, rows):
        from hf_memtune.cli.train import held_out

        return held_out

    def prepare(self, run: Run, model: torch.nn.Module) -> None:
        if run.arm == ADAPTERS:
            put_ordinary_adapters(model)


def put_ordinary_adapters(model: torch.nn.Module) -> None:
    """Those of the centred coupling, in layers that stay as they are.

    It is what make_reversible gives the layers above a reversible part; of a part with no layers there is no setting.
    """
    from hf_memtune import ReversibleConfig
    from hf_memtune.architectures.stacks import layer_stacks
    from hf_memtune.methods.reversible.adapters import Switch, freeze_but, places_of, put_adapters, trained_parameters

    config, stacks, kept = ReversibleConfig(reversible="centred", adapter_rank=RANK).filled(), layer_stacks(model), ExitStack()
    for stack in stacks:
        for layer in stack.layers:
            put_adapters(layer, stack.layout("an adapter"), config, places_of(config.reversible, False), Switch(), kept)
    freeze_but(model, trained_parameters(model, stacks, config), kept)
