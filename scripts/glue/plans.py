"""What is run: for every stage, arms x learning rates x seeds, as data. The machinery is that of scripts/quality.

tune    every arm on a grid of learning rates, on rows held out for tuning; a grid goes on where its end is best
final   at the best rates, other seeds and other held-out rows
time    a few steps of every arm, for seconds a step: to be run alone on the machine, with --timed
"""

from dataclasses import dataclass, replace

from glue.arms import FLAGS, FULL
from quality.plans import FINAL_SEEDS, Plan

TASK = "minilm-reviews"
ROWS, TUNING_STEPS, STEPS = 8, 100, 150
SMALL = tuple(arm for arm in FLAGS if arm != FULL)  # few parameters, larger steps

TUNE = (
    Plan(TASK, (FULL,), ROWS, TUNING_STEPS, (1e-4, 3e-4), measured=1),
    Plan(TASK, SMALL, ROWS, TUNING_STEPS, (1e-3, 3e-3), measured=1),
)
FINAL = (Plan(TASK, tuple(FLAGS), ROWS, STEPS, seeds=FINAL_SEEDS, held_out="test", measured=1),)
TIME = (replace(FINAL[0], steps=8, learning_rates=(1e-4,), seeds=(0, 1), measured=0),)
STAGES = {"tune": TUNE, "final": FINAL, "time": TIME}


@dataclass(frozen=True)
class Source:
    """The model and the rows, below the folder of assets. *_rows: held out, of rows shuffled by a seed of their own."""

    model: str = "models/all-MiniLM-L6-v2"
    data: str = "data/movie_reviews/rotten_tomatoes.jsonl"
    max_length: int = 64
    tuning_rows: int = 256
    test_rows: int = 768
    seed: int = 0
