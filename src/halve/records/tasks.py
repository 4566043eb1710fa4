"""Results of lm-evaluation-harness that are kept beside an output."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScore:
    """The score of one model in one task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric, such as `acc_norm`.
        value: The score; a fraction for `acc` and `acc_norm`.
        stderr: Its standard error, if the results hold one.
        shots: Number of examples in the prompt, if the results tell it.
        dataset: Name of the data set on the Hub, if the results tell it.
        higher_is_better: Whether a larger score is the better one.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    shots: int | None = None
    dataset: str = ""
    higher_is_better: bool = True


@dataclass(frozen=True)
class TasksRecord:
    """Scores of a model, and of the dense one if they are known.

    Attributes:
        model: Scores of the model.
        reference: Scores of the dense model.
    """

    model: tuple[TaskScore, ...]
    reference: tuple[TaskScore, ...] = ()
