"""Scores of a model in tasks of lm-evaluation-harness, which is an optional library."""

# ruff: noqa: PLC0415

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halve.calibration import load_tokenizer
from halve.checkpoint import resolve_model
from halve.errors import HalveError, SourceError
from halve.measure.lm_eval import task_scores
from halve.options import TaskOptions
from halve.records import TaskScore
from halve.runtime.generation import load
from halve.untrusted import truncated


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist, and how they are run.

    Attributes:
        names: Their names, one by one.
        manager: The TaskManager of lm-evaluation-harness that finds them.
        options: How they are run.
    """

    names: tuple[str, ...]
    manager: Any
    options: TaskOptions


def find_tasks(names: str | Sequence[str], options: TaskOptions) -> Tasks:
    """Look up tasks by their names; patterns such as `arc_*` are resolved.

    Called before a model is loaded.

    Args:
        names: Names of tasks or groups, separated by commas or in a sequence.
        options: Where further tasks are defined.

    Raises:
        HalveError: lm-evaluation-harness is not installed, or an option is invalid.
        SourceError: There is no such task.

    Cost:
        Seconds: the definitions of thousands of tasks are read.
    """
    options.check()
    if find_spec("lm_eval") is None:
        raise HalveError(
            "Tasks are run by lm-evaluation-harness, which is not installed.",
            "Run pip install 'halve[tasks]'.",
        )
    parts = [names] if isinstance(names, str) else names
    words = [word.strip() for part in parts for word in part.split(",")]
    manager = _manager(options)
    found = dict.fromkeys(n for word in words for n in _found(manager, word))
    return Tasks(tuple(found), manager, options)


def _manager(options: TaskOptions) -> Any:  # noqa: ANN401
    from lm_eval.tasks import TaskManager

    folder = options.include_path
    if folder is not None and not Path(folder).is_dir():
        raise SourceError(
            f"{folder} is not a folder with tasks.",
            "Set include_path (--include-path) to the folder of their YAML files.",
        )
    return TaskManager(include_path=folder)


def _found(manager: Any, word: str) -> list[str]:  # noqa: ANN401
    """Return the tasks of a name or pattern."""
    names = sorted(manager.match_tasks([word])) if word else []
    if not names:
        close = get_close_matches(word, manager.all_tasks)
        listed = f"{' or '.join(close)}, or a name" if close else "One"
        raise SourceError(
            f"{word!r} is not a task of lm-evaluation-harness.",
            f"Use {listed[0].lower()}{listed[1:]} that `lm_eval ls tasks` lists.",
        )
    return names


def score_tasks(
    model: str | Path,
    tasks: Tasks,
    device: str,
    trust_remote_code: bool,
) -> tuple[TaskScore, ...]:
    """Return the score of one model in each task, with its standard error.

    Args:
        model: A folder, dense or packed, or a name on the Hub.
        tasks: From `find_tasks`.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        SourceError: A task cannot be run, for instance since its data set cannot be
            downloaded.
        HalveError: Whatever `halve.load` raises.

    Cost:
        Memory for the whole model; a packed one stays packed.
    """
    from lm_eval import simple_evaluate

    evaluate: Any = simple_evaluate  # its decorator hides its parameters
    options = tasks.options
    opened = _language_model(model, options.batch_size, device, trust_remote_code)
    try:
        results = evaluate(
            opened,
            tasks=list(tasks.names),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=tasks.manager,
            log_samples=False,
        )
    except Exception as error:  # of data sets and of the code of tasks; of any class
        raise SourceError(
            f"lm-evaluation-harness cannot run {', '.join(tasks.names)[:200]} "
            f"({type(error).__name__}: {truncated(' '.join(str(error).split()))}).",
            "Check that the data sets of the tasks can be downloaded.",
        ) from error
    return task_scores(results or {"results": {}})


def _language_model(
    model: str | Path, batch_size: int, device: str, trust_remote_code: bool
) -> Any:  # noqa: ANN401
    """Return a model as lm-evaluation-harness calls it."""
    from lm_eval.models.huggingface import HFLM

    wrap: Any = HFLM  # its decorator hides its parameters
    loaded = load(model, device, trust_remote_code)
    tokenizer = load_tokenizer(resolve_model(model), trust_remote_code)
    with _without_warnings("lm_eval.models.huggingface"):
        return wrap(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Silence a logger: that options are ignored with a loaded model is intended."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
