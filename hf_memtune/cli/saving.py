"""When and where a training leaves its model: before anything is reported of it, in a folder that can be moved."""

import json
from pathlib import Path

from transformers import TrainerCallback

from hf_memtune import files
from hf_memtune.architectures.stacks import unwrapped


class SaveFirst(TrainerCallback):
    """Saves the model and the trainer's state as soon as training ends: a report or a picture that fails costs no training.

    Add it last: the methods are off the model by then.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.save_model()
        self.trainer.save_state()


class BestAfterMove(TrainerCallback):
    """Finds the best checkpoint of a run whose folder was moved: transformers stores its path, and gives it up where that is gone."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_model_checkpoint is None and state.best_global_step:
            folder = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(folder) if folder.is_dir() else None


class SaveLabels(TrainerCallback):
    """Writes the names of the classes beside adapters of a classifier: a whole model has them in its config. Add it after SaveFirst."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir))

    def write(self, folder: Path) -> None:
        from hf_memtune.cli.data.classes import CLASSIFIER, LABELS

        model = unwrapped(self.trainer.model)
        is_wanted = type(model).__name__.endswith(CLASSIFIER) and not (folder / "config.json").is_file()
        if is_wanted and self.trainer.args.should_save and folder.is_dir():
            names = [model.config.id2label[number] for number in range(model.config.num_labels)]
            files.write_text(folder / LABELS, json.dumps(names) + "\n")
