"""When and where a training leaves its model: before anything is reported of it, in a folder that can be moved."""

from pathlib import Path

from transformers import TrainerCallback


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
