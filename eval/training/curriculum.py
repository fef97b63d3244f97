"""The curriculum: lengths, task mixes and learning rate by stage, and the growing pool of keys."""

from dataclasses import asdict, dataclass, field

from pikv_hf.eval.reference.synthetic.words import KEYS

_PRIMERS = {"repetition": 0.15, "association": 0.3, "recall": 0.55}
_PRIMERS_AND_VARIABLES = {"repetition": 0.1, "association": 0.2, "recall": 0.5, "variable_recall": 0.2}
_MIXED = {
    "recall": 0.15,
    "variable_recall": 0.05,
    "multikey": 0.3,
    "multivalue": 0.2,
    "multiquery": 0.1,
    "vt": 0.2,
}
# Listing values in order is learnt last by far, so it gets the largest share.
_RETRIEVAL = {"vt": 0.2, "multivalue": 0.4, "multiquery": 0.1, "multikey": 0.22, "single": 0.08}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the curriculum.

    Attributes
    ----------
    name : str
        For logs.
    shapes : tuple[tuple[int, int], ...]
        (tokens per row, rows over all processes), cycled through step by step.
    steps : int
        Optimizer steps; for a growing stage an upper bound.
    mix : dict[str, float]
        Share of each task.
    pose_share : float
        Share of the steps with position skips.
    pose_span : int
        Largest position id of those steps.
    growing : bool
        Whether the stage starts with 8 keys and lasts until all are learnt.
    decay : bool
        Whether the learning rate falls linearly to 5% over the stage.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    steps: int
    mix: dict[str, float]
    pose_share: float = 0.0
    pose_span: int = 0
    growing: bool = False
    decay: bool = False


CURRICULUM: tuple[Stage, ...] = (
    Stage("recall", ((96, 64),), 800, _PRIMERS, growing=True),
    Stage("tasks at 192", ((192, 40),), 400, _MIXED),
    Stage("tasks at 256 and 512", ((256, 40), (512, 24)), 1000, _RETRIEVAL, 0.3, 2048),
    Stage("tasks at 256 to 1024", ((1024, 12), (512, 24), (256, 40)), 300, _RETRIEVAL, 0.35, 2560),
    Stage("tasks at 640 to 2048", ((1280, 10), (640, 20), (2048, 6)), 400, _RETRIEVAL, 0.35, 2560, decay=True),
)

FINAL_LEARNING_RATE = 0.05
FIRST_POOL = 8
GROWTH_ACCURACY = 0.85
# Variable tracking joins the first stage once matching a key has emerged; earlier it would dilute the signal.
VARIABLES_POOL = 64
# The full pool and variables get some practice even if the pool filled up early.
MINIMUM_GROWING_STEPS = 400
_SMOOTHING = 0.7


def scaled(steps: int, scale: float) -> int:
    """``steps`` times ``scale``, at least 1."""
    return max(1, round(steps * scale))


@dataclass(slots=True)
class Progress:
    """Where training stands; everything but weights and optimizer state that a resumed run needs.

    Attributes
    ----------
    step, stage, stage_step : int
        Optimizer steps done, index of the current stage and steps done in it.
    pool : int
        Keys in use.
    recall : float
        Smoothed first-digit accuracy of the recall primer with the current pool, in [0, 1].
    tokens : int
        Tokens trained on, padding included.
    wall_seconds, cpu_seconds : float
        Wall time and CPU time of all processes, summed over interruptions.
    runs : int
        Times the script was started.
    stage_ends : list[int]
        Step at which each finished stage ended.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    pool: int = FIRST_POOL
    recall: float = 0.0
    tokens: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    runs: int = 0
    stage_ends: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Plain values for a checkpoint or a model card."""
        return asdict(self)

    def mix(self, stage: Stage) -> dict[str, float]:
        """Task mix of the next step."""
        return _PRIMERS_AND_VARIABLES if stage.growing and self.pool >= VARIABLES_POOL else stage.mix

    def keys(self) -> tuple[str, ...]:
        """Keys in use. They are listed alphabetically, so a stride takes them from all over the list."""
        return KEYS[:: len(KEYS) // self.pool]

    def learning_rate(self, stage: Stage, scale: float) -> float:
        """Multiplier of all learning rates at the next step."""
        if not stage.decay:
            return 1.0
        done = self.stage_step / scaled(stage.steps, scale)
        return 1.0 - (1.0 - FINAL_LEARNING_RATE) * done

    def advance(self, stage: Stage, recall: float | None, tokens: int, scale: float) -> None:
        """Count one step; grow the pool of keys; move on to the next stage when this one is done.

        Parameters
        ----------
        stage : Stage
            The current stage.
        recall : float or None
            First-digit accuracy of the recall primer in this step's batch, None if it had none.
        tokens : int
            Tokens of this step over all processes.
        scale : float
            Factor on the stages' steps.
        """
        self.step += 1
        self.stage_step += 1
        self.tokens += tokens
        learnt = stage.growing and self._grow(recall)
        if learnt or self.stage_step >= scaled(stage.steps, scale):
            self.stage += 1
            self.stage_step = 0
            self.pool = len(KEYS)
            self.stage_ends.append(self.step)

    def _grow(self, recall: float | None) -> bool:
        """Double the pool when recall is good. Returns whether the full pool is learnt."""
        if recall is not None:
            self.recall = _SMOOTHING * self.recall + (1 - _SMOOTHING) * recall
        if self.recall < GROWTH_ACCURACY:
            return False
        if self.pool == len(KEYS):
            return self.stage_step >= MINIMUM_GROWING_STEPS
        self.pool *= 2
        self.recall = 0.0
        return False
