"""What is run, as data: arms, batches, steps and learning rates of every task; and which runs of a stage are left.

screen  arms of your choice, few steps, for a first impression
tune    the arms of the finals on rows held out for tuning: which learning rate each gets
final   at those rates, other seeds, and rows that nothing was chosen on
time    a few steps of the same arms, for seconds a step: to be run alone on the machine, with --timed
race    the finals again, but of as many steps as fit into the seconds of plain training; what `time` found says how many. Also arms with
        batches of another size: token seeking affords more rows, and exact ways with fewer rows afford more steps
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import NamedTuple

from learning.arms import BY_LAYERS, CHECKPOINTING, EVERY_LABEL, FLAGS, FULL, LORA, PLAIN, QA, STREAMING, check, is_exact

KEY = ("stage", "task", "arm", "rows", "steps", "learning_rate", "seed")


class Stage(NamedTuple):
    """measured: times the held-out loss is measured after the start. steps: where they are not those of the plan."""

    seeds: tuple[int, ...]
    held_out: str
    measured: int
    steps: int | None = None


STAGES = {
    "screen": Stage((0,), "tuning", 2),
    "tune": Stage((0,), "tuning", 1),
    "final": Stage((1, 2, 3), "test", 3),
    "time": Stage((0, 1), "test", 0, steps=8),
    "race": Stage((1, 2, 3), "test", 1),
}


@dataclass(frozen=True)
class Plan:
    """steps: of tuning and of the finals. learning_rates: that are tuned among; rates_of: of arms that need others.

    timed: arms that `time` runs beside the others, for their bytes and seconds: what they learn is known; at `timed_seeds`. raced: the arms of `race`.
    resized: the arms of `race` that are also run with batches of other sizes; tuned with these, too.
    """

    task: str
    arms: tuple[str, ...]
    rows: int
    steps: tuple[int, int]
    learning_rates: tuple[float, ...]
    rates_of: dict[str, tuple[float, ...]] = field(default_factory=dict)
    measured: int | None = None  # where a run can be measured less often than the stage says
    timed: tuple[str, ...] = ()
    timed_seeds: tuple[int, ...] = STAGES["time"].seeds
    raced: tuple[str, ...] = ()
    resized: tuple[tuple[str, int], ...] = ()

    def sized_arms(self, stage: str) -> tuple[tuple[str, int], ...]:
        """Arms with the rows of their batches. Of tuning: but for exact ways, which take the rate of plain training."""
        arms = {"time": (*self.arms, *self.timed), "race": self.raced}.get(stage, self.arms)
        sized = [*((arm, self.rows) for arm in arms), *(self.resized if stage in ("tune", "time", "race") else ())]
        return tuple(dict.fromkeys((PLAIN if is_exact(arm) else arm, rows) for arm, rows in sized) if stage == "tune" else sized)


AT_A_TIME = (CHECKPOINTING, *(f"{arm}@1" for arm in (PLAIN, CHECKPOINTING, STREAMING, BY_LAYERS)))
# The arms of quality were chosen after a screening: the papers', what won, and what each choice does by itself.
PLANS = {
    "quality": (
        Plan(
            "stories-imdb",
            (PLAIN, STREAMING, "random/top/cut/10%", "combined/top/cut/10%", "combined-mean/top/cut/10%", "random/sample/cut/10%",
             "combined/sample/cut/10%", "random/sample/stream/10%", "combined/sample/stream/10%", "random/sample/cut/30%",
             "random/sample/stream/30%", "true_gradient/sample/cut/30%", "true_gradient/sample/stream/30%"),
            rows=4, steps=(50, 100), learning_rates=(3e-5, 8e-5, 2e-4, 5e-4), timed=AT_A_TIME,
            raced=(STREAMING, "random/sample/cut/30%", "random/sample/stream/30%", "true_gradient/sample/cut/30%", "random/sample/cut/10%"),
            resized=((STREAMING, 2), ("random/sample/cut/10%", 12), ("random/sample/cut/30%", 8)),
        ),
        Plan(
            "smollm2-imdb",
            (PLAIN, STREAMING, "random/top/cut/10%", "combined/top/cut/10%", "random/sample/cut/10%", "random/sample/cut/30%",
             "true_gradient/sample/cut/30%"),
            rows=2, steps=(8, 20), learning_rates=(5e-4, 1.5e-3, 4.5e-3), measured=1, timed=AT_A_TIME, timed_seeds=(0,),
            raced=(f"{STREAMING}@1", f"{BY_LAYERS}@1", "random/sample/cut/30%", "true_gradient/sample/cut/30%", "random/sample/cut/10%"),
        ),
        Plan(
            "minilm-reviews", (PLAIN, *(f"{scorer}/top/cut/10%" for scorer in ("random", "context", "gradient", "combined"))),
            rows=16, steps=(40, 60), learning_rates=(1e-4, 3e-4, 9e-4),
        ),
        Plan(
            "smollm2-alpaca",
            (PLAIN, STREAMING, "random/top/cut/10%", "combined/top/cut/10%", "combined/top/cut/10%/labels", "random/sample/cut/10%/labels",
             "combined/sample/cut/10%/labels", "random/sample/stream/10%/labels", "random/sample/cut/30%/labels", EVERY_LABEL,
             "true_gradient/sample/cut/30%/labels", "true_gradient/sample/stream/30%/labels", "true_gradient/sample/cut/10%/labels",
             "softmax_residual/sample/cut/30%/labels", "true_gradient/top/cut/10%/labels", "true_gradient/top/cut/30%/labels"),
            rows=4, steps=(20, 30), learning_rates=(5e-4, 1.5e-3, 4.5e-3), timed=AT_A_TIME,
            raced=(STREAMING, f"{PLAIN}@1", f"{CHECKPOINTING}@1", f"{BY_LAYERS}@1", "random/sample/cut/30%/labels", "true_gradient/sample/cut/30%/labels",
                   "random/sample/cut/10%/labels"),
            resized=((f"{CHECKPOINTING}@1", 2), (f"{PLAIN}@1", 2), ("random/sample/cut/10%/labels", 8), ("random/sample/cut/30%/labels", 6)),
        ),
    ),
    # all but full fine-tuning have few parameters, and take larger steps
    "glue": (
        Plan(
            "minilm-reviews", tuple(FLAGS), rows=8, steps=(100, 150), learning_rates=(1e-3, 3e-3, 9e-3),
            rates_of={FULL: (3.33e-5, 1e-4, 3e-4), LORA: (3.33e-4, 1e-3, 3e-3)}, measured=1,
        ),
    ),
    "qa": tuple(
        Plan(task, tuple(QA), rows=4, steps=(20, 60), learning_rates=(3e-4, 1e-3), rates_of={PLAIN: (2e-5, 1e-4)}, measured=1)
        for task in ("boolq", "mmlu")
    ),
}  # fmt: skip
TASKS = tuple(plan.task for plan in PLANS["quality"])
RACED = tuple(plan.task for plan in PLANS["quality"] if plan.raced)


@dataclass(frozen=True)
class Run:
    """held_out: the rows the loss is measured on, tuning or test. measured: how many times after the start; 0: never."""

    stage: str
    task: str
    arm: str
    rows: int
    steps: int
    learning_rate: float
    seed: int
    held_out: str = "tuning"
    measured: int = 4

    def __str__(self) -> str:
        return f"{self.stage} {self.task} {self.rows} rows {self.steps} steps {self.arm} rate {self.learning_rate:g} seed {self.seed}"


class Cell(NamedTuple):
    """One arm at one seed. grid: its learning rates; empty where its tuning says which. plain_rows: of the plain training it is raced against."""

    run: Run
    grid: tuple[float, ...]
    plain_rows: int

    def runs(self, done: list[dict]) -> list[Run]:
        """Those that can be named by now: a final once its rate is chosen, one of a race once its steps are timed."""
        steps = steps_in_time(self.run, self.plain_rows, done) if self.run.stage == "race" else (self.run.steps,)
        return [replace(self.run, learning_rate=rate, steps=n) for n in steps for rate in self.grid or chosen_rate(self.run, done)]


def chosen_rate(run: Run, done: list[dict]) -> tuple[float, ...]:
    """The one with the lowest loss in the tuning. What must equal plain training takes the rate of plain."""
    tuned = {"stage": "tune", "task": run.task, "rows": run.rows, "arm": PLAIN if is_exact(run.arm) else run.arm}
    found = [record for record in done if tuned.items() <= record.items()]
    return (min(found, key=final_loss)["learning_rate"],) if found else ()


def steps_in_time(run: Run, plain_rows: int, done: list[dict]) -> tuple[int, ...]:
    """How many steps fit into the seconds that plain training takes for those of the run. None until both were timed."""
    timed = [{"timed": True, "task": run.task, "rows": rows, "arm": arm} for arm, rows in ((PLAIN, plain_rows), (run.arm, run.rows))]
    found = [[record["seconds_per_step"] for record in done if wanted.items() <= record.items()] for wanted in timed]
    return (round(run.steps * median(found[0]) / median(found[1])),) if all(found) else ()


def cells(study: str, options) -> list[Cell]:
    """All of a stage, with what the options replace. Raises ValueError for a task or an arm that there is none of."""
    stage, found = STAGES[options.stage], []
    for arm in options.arms or ():
        check(study, arm)
    if unknown := set(options.tasks or ()) - {plan.task for plan in PLANS[study]}:
        raise ValueError(f"task {', '.join(unknown)}: expected some of {', '.join(plan.task for plan in PLANS[study])}")
    for plan in PLANS[study]:
        if plan.task not in (options.tasks or [plan.task]):
            continue
        steps = options.steps or stage.steps or plan.steps[options.stage in ("final", "race")]
        measured = min(stage.measured, plan.measured or stage.measured) if options.measured is None else options.measured
        sized = [(arm, plan.rows) for arm in options.arms or ()] or plan.sized_arms(options.stage)
        for seed in options.seeds or (plan.timed_seeds if options.stage == "time" else stage.seeds):
            for arm, rows in sized:
                run = Run(options.stage, plan.task, arm, options.rows or rows, steps, 0.0, seed, stage.held_out, measured)
                found.append(Cell(run, tuple(options.learning_rates or _grid(options.stage, plan, arm)), options.rows or plan.rows))
    return found


def _grid(stage: str, plan: Plan, arm: str) -> tuple[float, ...]:
    return {"final": (), "race": (), "time": (1e-4,)}.get(stage, plan.rates_of.get(arm, plan.learning_rates))


def pending(wanted: Iterable[Cell], done: list[dict]) -> list[Run]:
    """What is not done yet."""
    finished = {key(record) for record in done}
    return [run for cell in wanted for run in cell.runs(done) if key(asdict(run)) not in finished]


def key(record: dict) -> tuple:
    """What tells one run from another."""
    return tuple(record[name] for name in KEY)


def latest(found: Iterable[dict]) -> list[dict]:
    """The last record of each run."""
    return list({key(record): record for record in found}.values())


def final_loss(record: dict) -> float:
    """The last held-out loss; infinite where the run diverged or measured none."""
    loss = record["losses"][-1][1] if record["losses"] else None
    return float("inf") if loss is None else loss
