"""`halve eval --tasks`."""

import io
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from halve.errors import HalveError
from halve.options import EvalOptions, TaskOptions

if TYPE_CHECKING:
    from halve.records import TasksRecord

# Options of `halve eval` that do not concern the text.
_SHARED = ("device", "trust_remote_code", "progress")


def check_task_options(
    tasks: str | None, options: EvalOptions, task_options: TaskOptions, keep: bool
) -> None:
    """Refuse options that would have no effect, or would keep a part as the whole.

    Raises:
        HalveError: There are such options.
    """
    if tasks is None:
        _refuse(task_options, TaskOptions(), "concerns tasks", "Pass --tasks as well.")
        return
    shared = {name: getattr(options, name) for name in _SHARED}
    concern = "concerns a text, and --tasks reads none"
    _refuse(options, EvalOptions(**shared), concern, "Omit it, or omit --tasks.")
    if keep and task_options.limit is not None:
        raise HalveError(
            f"The score of {task_options.limit} questions is not that of a task.",
            "Omit --limit, or omit --keep.",
        )


def _refuse(
    options: EvalOptions | TaskOptions,
    default: EvalOptions | TaskOptions,
    concern: str,
    remedy: str,
) -> None:
    """Raise HalveError if an option is not at its default."""
    for field in fields(options):
        if getattr(options, field.name) != getattr(default, field.name):
            raise HalveError(f"--{field.name.replace('_', '-')} {concern}.", remedy)


def run_tasks(
    models: tuple[str, str | None],
    tasks: str,
    options: EvalOptions,
    task_options: TaskOptions,
    quiet: bool,
) -> "TasksRecord":
    """Return the scores of a model, and of the dense one if there is one.

    lm-evaluation-harness shows its own progress on standard error.
    """
    from transformers.utils.logging import disable_progress_bar

    from halve.api import evaluate_tasks

    disable_progress_bar()
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        return evaluate_tasks(
            models[0],
            tasks,
            models[1],
            options=task_options,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )


def task_scores_as_json(record: "TasksRecord") -> str:
    """Return the scores as JSON, with the recovery of each task as a fraction."""
    from halve.records.codec import to_json

    recovery = {score.task: record.recovery(score) for score in record.model}
    return to_json(asdict(record) | {"recovery": recovery})


def print_task_scores(record: "TasksRecord", model: str, against: str | None) -> None:
    """Print a table of the scores, with those of the dense model if there is one."""
    from halve.cli.console import print_table
    from halve.reporting.tasks import TASK_COLUMNS, task_rows

    rows = task_rows(record)
    if against is not None:
        print_table(f"{model}, against {against}", TASK_COLUMNS, rows)
    else:
        scores = [(task, metric, shots, own) for task, metric, shots, _, own, _ in rows]
        print_table(model, (*TASK_COLUMNS[:3], "Score"), scores)
