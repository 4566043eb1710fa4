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

    def dense(self, score: TaskScore) -> TaskScore | None:
        """Return the dense model's score of the same task and metric, if known."""
        same = (score.task, score.metric)
        return next((s for s in self.reference if (s.task, s.metric) == same), None)

    def recovery(self, score: TaskScore) -> float | None:
        """Return a score as a fraction of the dense model's.

        None where that is not known or zero, or where a smaller score is the better
        one, as with a perplexity.
        """
        dense = self.dense(score)
        if dense is None or not dense.value or not score.higher_is_better:
            return None
        return score.value / dense.value
