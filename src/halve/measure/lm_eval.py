"""Read the results that lm-evaluation-harness writes.

`lm_eval --output_path` writes a `results_*.json`. Its `results` hold for each task a
value `METRIC,FILTER` for each metric and filter, and `METRIC_stderr,FILTER`; `configs`,
`n-shot` and `higher_is_better` describe the tasks. Groups have an entry in
`group_subtasks` with their tasks, and are left out: their scores are means of those.
"""

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from halve.errors import SourceError
from halve.records import TaskScore
from halve.records.stored import PARSE_ERRORS
from halve.untrusted import MAX_NAME, read_json

# The metric that is reported for a task, the first of these that it has.
_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity")
_STDERR = "_stderr"


def read_task_scores(path: str | Path) -> tuple[TaskScore, ...]:
    """Return one score for each task in a file of results, sorted by task.

    Raises:
        SourceError: The file cannot be read, or holds no scores.
    """
    try:
        fields = dict(read_json(Path(path)))
        scores = task_scores(fields)
    except (OSError, *PARSE_ERRORS) as error:
        raise SourceError(
            f"{path} cannot be read as results of lm-evaluation-harness "
            f"({str(error)[:200]}).",
            "Pass the results_*.json that `lm_eval --output_path` wrote.",
        ) from error
    if not scores:
        raise SourceError(
            f"{path} holds no score of a task.",
            "Pass the results_*.json that `lm_eval --output_path` wrote.",
        )
    return scores


def task_scores(fields: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """Return one score for each task in results, sorted by task."""
    return tuple(_scores(fields))


def _scores(fields: Mapping[str, Any]) -> Iterator[TaskScore]:
    groups = {name for name, tasks in fields.get("group_subtasks", {}).items() if tasks}
    for task, values in sorted(fields["results"].items()):
        found = _metric(values)
        if task not in groups and found is not None:
            yield _score(fields, task[:MAX_NAME], found)


def _metric(values: dict[str, Any]) -> tuple[str, float, float | None] | None:
    """Return metric, value and standard error of a task; None if it has none."""
    names = [n for n in values if "," in n and f"{_STDERR}," not in n]
    order = {name: place for place, name in enumerate(_METRICS)}
    names.sort(key=lambda name: order.get(name.partition(",")[0], len(order)))
    for name in names:
        metric, _, rule = name.partition(",")
        if (value := _number(values[name])) is not None:
            return metric, value, _number(values.get(f"{metric}{_STDERR},{rule}"))
    return None


def _score(
    fields: Mapping[str, Any], task: str, found: tuple[str, float, float | None]
) -> TaskScore:
    metric, value, stderr = found
    shots = fields.get("n-shot", {}).get(task)
    directions = fields.get("higher_is_better", {}).get(task) or {}
    dataset = fields.get("configs", {}).get(task, {}).get("dataset_path")
    return TaskScore(
        task=task,
        metric=metric[:MAX_NAME],
        value=value,
        stderr=stderr,
        shots=shots if isinstance(shots, int) and shots >= 0 else None,
        dataset=dataset[:MAX_NAME] if isinstance(dataset, str) else "",
        higher_is_better=directions.get(metric, True) is not False,
    )


def _number(value: object) -> float | None:
    """Return a finite number; None for anything else, such as `N/A`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None
