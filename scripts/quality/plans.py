"""What is run: for every stage, arms x batch sizes x learning rates x seeds, as data. Edit here, or override on the command line.

screen  every arm, few steps, on the cheapest task: which are worth more
tune    the arms of the finals on rows held out for tuning: which learning rate each gets
final   at those rates, other seeds, and rows that nothing was chosen on
time    a few steps of the same arms, for seconds a step: to be run alone on the machine, with --timed
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from quality import records
from quality.arms import PLAIN, STREAMING, crossed
from quality.training import Run

TUNING_SEED, FINAL_SEEDS = 0, (1, 2, 3)
FURTHER_RATES = 1  # that tuning may add beyond the ends of its grid, each the same factor further


@dataclass(frozen=True)
class Plan:
    """learning_rates: of one stage the grid; empty where they come from the tuning. measured: times after the start."""

    task: str
    arms: tuple[str, ...]
    rows: int
    steps: int
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (TUNING_SEED,)
    held_out: str = "tuning"
    measured: int = 2


# Chosen after the screening: the papers' arms, what won, what each choice does by itself. One less often of the larger model.
ALPACA_ARMS = (
    PLAIN, "random/top/cut/10%", "combined/top/cut/10%", "combined/top/cut/10%/labels", "random/sample/cut/10%/labels",
    "combined/sample/cut/10%/labels", "random/sample/stream/10%/labels", "random/sample/cut/30%/labels",
)  # fmt: skip
STORIES_ARMS = (
    PLAIN, "random/top/cut/10%", "combined/top/cut/10%", "combined-mean/top/cut/10%", "random/sample/cut/10%",
    "combined/sample/cut/10%", "random/sample/stream/10%", "combined/sample/stream/10%", "random/sample/cut/30%",
    "random/sample/stream/30%",
)  # fmt: skip
LARGE_BATCH_ARMS = (
    PLAIN, "random/top/cut/10%", "combined/top/cut/10%", "random/sample/cut/10%", "random/sample/stream/10%",
    "combined/sample/stream/10%",
)  # fmt: skip
REVIEW_ARMS = (PLAIN, *crossed(("random", "context", "gradient", "combined"), ("top",), ("cut",), ("10%",)))

SCREEN = (
    Plan("stories-imdb", (PLAIN, *crossed(ratios=("10%",))), rows=4, steps=50, learning_rates=(5e-4,)),
    Plan(
        "stories-imdb",
        crossed(("random", "combined"), gradients=("cut", "stream"), ratios=("30%",)),
        rows=4,
        steps=50,
        learning_rates=(5e-4,),
    ),
    Plan("stories-imdb", LARGE_BATCH_ARMS, rows=32, steps=15, learning_rates=(5e-4, 1e-3)),
)
TUNE = (
    Plan("stories-imdb", STORIES_ARMS, rows=4, steps=50, learning_rates=(2e-4, 5e-4), measured=1),
    Plan("minilm-reviews", REVIEW_ARMS, rows=16, steps=40, learning_rates=(1e-4, 3e-4), measured=1),
    Plan("smollm2-alpaca", ALPACA_ARMS, rows=4, steps=20, learning_rates=(5e-4, 1.5e-3), measured=1),
)
# Exact streaming must equal plain training, so it is tuned by nobody: it takes the rate of plain.
FINAL = tuple(
    replace(
        plan, arms=(plan.arms[0], *extra, *plan.arms[1:]), steps=steps, learning_rates=(), seeds=FINAL_SEEDS, held_out="test", measured=3
    )
    for plan, extra, steps in zip(TUNE, ((STREAMING,), (), (STREAMING,)), (100, 60, 30))
)
TIME = tuple(replace(plan, steps=8, learning_rates=(1e-4,), seeds=(0, 1), measured=0) for plan in FINAL)
STAGES = {"screen": SCREEN, "tune": TUNE, "final": FINAL, "time": TIME}


@dataclass(frozen=True)
class Cell:
    """One arm at one seed, at whatever learning rates it is to have: the unit that workers share out."""

    stage: str
    plan: Plan
    arm: str
    seed: int

    def runs(self, done: list[dict]) -> list[Run]:
        """Those that can be named by now: a final once its rate is chosen."""
        plan = self.plan
        return [
            Run(self.stage, plan.task, self.arm, plan.rows, plan.steps, rate, self.seed, plan.held_out, plan.measured)
            for rate in rates(self.stage, plan, self.arm, done)
        ]


def cells(stage: str, plans: Iterable[Plan], worker: int = 0, workers: int = 1) -> list[Cell]:
    """A worker's share of a stage: every so many cells, all arms of a seed in turn. Workers must be given the same plans."""
    every = [Cell(stage, plan, arm, seed) for plan in plans for seed in plan.seeds for arm in plan.arms]
    return every[worker::workers]


def pending(share: list[Cell], done: list[dict]) -> list[Run]:
    """What is not done yet."""
    finished = {records.key(record) for record in done}
    return [run for cell in share for run in cell.runs(done) if records.key(asdict(run)) not in finished]


def rates(stage: str, plan: Plan, arm: str, done: list[dict]) -> tuple[float, ...]:
    """The learning rates to run: of the grid, of the grid and beyond in tuning, or the one that was chosen by it."""
    if stage == "tune":
        return _widened(plan, records.of(done, stage=stage, task=plan.task, arm=arm, rows=plan.rows, steps=plan.steps))
    if plan.learning_rates:
        return plan.learning_rates
    tuned = records.of(done, stage="tune", task=plan.task, arm=PLAIN if arm == STREAMING else arm, rows=plan.rows)
    return (best_rate(tuned),) if tuned else ()


def best_rate(tuned: list[dict]) -> float:
    """The rate with the lowest final loss."""
    return min(tuned, key=records.final_loss)["learning_rate"]


def _widened(plan: Plan, tuned: list[dict]) -> tuple[float, ...]:
    """The grid, and a rate beyond its end where that end is the best so far, up to FURTHER_RATES more."""
    grid = sorted({*plan.learning_rates, *(record["learning_rate"] for record in tuned)})
    finished = {record["learning_rate"] for record in tuned} >= set(grid)
    if len(grid) < 2 or not finished or len(grid) >= len(plan.learning_rates) + FURTHER_RATES:
        return tuple(grid)
    factor, best = grid[1] / grid[0], best_rate(tuned)
    if best == grid[-1]:
        return (*grid, _rounded(best * factor))
    return (_rounded(best / factor), *grid) if best == grid[0] else tuple(grid)


def _rounded(rate: float) -> float:
    """To three digits: a rate names its run, and must be the same number however it was computed."""
    return float(f"{rate:.3g}")
