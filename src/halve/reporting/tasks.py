"""Scores in tasks as rows of a table."""

from statistics import fmean

from halve.records import TaskScore, TasksRecord
from halve.reporting.numbers import percent, with_error

# Headings of the rows of `task_rows`.
TASK_COLUMNS = ("Task", "Metric", "Shots", "Dense", "Pruned", "Recovery")


def task_rows(record: TasksRecord) -> list[tuple[str, ...]]:
    """Return a row for each task, and one of the means if several can be compared.

    A score has its standard error; the recovery is the score in per cent of the dense
    one. Cells are empty where the dense score is not known.
    """
    rows = [_row(record, score) for score in record.model]
    both = [
        (score.value, dense.value)
        for score in record.model
        if record.recovery(score) is not None
        and (dense := record.dense(score)) is not None
    ]
    if len(both) > 1:
        pruned, dense = (fmean(side) for side in zip(*both, strict=True))
        cells = (percent(dense), percent(pruned), percent(pruned / dense))
        rows.append((f"mean of the {len(both)} that both have", "", "", *cells))
    return rows


def _row(record: TasksRecord, score: TaskScore) -> tuple[str, ...]:
    dense, recovery = record.dense(score), record.recovery(score)
    return (
        score.task,
        score.metric,
        "" if score.shots is None else str(score.shots),
        "" if dense is None else _with_error(dense),
        _with_error(score),
        "" if recovery is None else percent(recovery),
    )


def _with_error(score: TaskScore) -> str:
    is_fraction = 0 <= score.value <= 1 and score.metric.startswith(("acc", "exact"))
    factor, unit = (100, " %") if is_fraction else (1, "")
    error = None if score.stderr is None else factor * score.stderr
    return with_error(factor * score.value, error, unit)
