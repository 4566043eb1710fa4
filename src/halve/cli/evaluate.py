"""`halve eval`."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from halve.cli.eval_tasks import (
    check_task_options,
    print_task_scores,
    run_tasks,
    task_scores_as_json,
)
from halve.cli.options import Json, Keep, Model, Quiet, check_found, with_options
from halve.option import TASKS, TEXT, Option
from halve.options import EvalOptions, TaskOptions

if TYPE_CHECKING:
    from halve.cli.progress import Step
    from halve.records import (
        ComparisonRecord,
        PerplexityRecord,
        Progress,
        TasksRecord,
    )

# Characters of a model's name in a line of progress.
_LONGEST_NAME = 20

EXAMPLES = """
**Examples**

`halve eval ./opt-125m-half --data wikitext2`

`halve eval ./opt-125m-half --data wikitext2 --against facebook/opt-125m`

`halve eval ./llama-24 --data text.txt --seq-len 1024 --segments 100 --json`

`halve eval ./llama-24 --tasks arc_easy,hellaswag --against ./llama --keep`
"""


@dataclass(frozen=True)
class EvalOutput:
    """Where results go; options of the command line alone."""

    keep: Keep = False
    as_json: Json = False
    quiet: Quiet = False


@with_options(panels=True)
def command(
    model: Model,
    options: EvalOptions,
    *,
    tasks: Annotated[
        str | None,
        Option(
            "Tasks of lm-evaluation-harness, separated by commas: report scores in "
            "these, and no perplexity.",
            TASKS,
            metavar="NAMES",
        ),
    ] = None,
    task_options: TaskOptions,
    against: Annotated[
        str | None,
        Option(
            "Another model, usually the dense one: also report how far the predictions "
            "of MODEL diverge from it, or how much of its scores is left.",
            TEXT,
            metavar="DENSE",
        ),
    ] = None,
    output: EvalOutput,
) -> None:
    """Measure a model's perplexity, block by block, even if it exceeds memory.

    With --tasks, measure its scores in tasks of lm-evaluation-harness.
    """
    check_found(against)
    check_task_options(tasks, options, task_options, output.keep)
    from halve.cli.console import print_next
    from halve.measure import check_keepable, keep_measurement

    folder = check_keepable(model) if output.keep else None
    if tasks is None:
        record = _measure(model, against, options, output.quiet)
    else:
        record = run_tasks((model, against), tasks, options, task_options, output.quiet)
    if folder is not None:
        keep_measurement(folder, record, against)
    if output.as_json:
        print(_as_json(record))
    else:
        _print(record, model, against)
        print_next(("bench", model), *([("report", model)] if output.keep else []))


def _measure(
    model: str, against: str | None, options: EvalOptions, quiet: bool
) -> "PerplexityRecord | ComparisonRecord":
    """Return the perplexity of a model, or its divergence from another."""
    from halve.api import perplexity
    from halve.cli.progress import progress_bar

    if against is not None:
        return compare_showing(model, against, options, quiet)
    with progress_bar(quiet) as show:
        options = replace(options, progress=lambda p: show(_step(p, model, None)))
        return perplexity(model, options=options)


def compare_showing(
    model: str, against: str, options: EvalOptions, quiet: bool
) -> "ComparisonRecord":
    """Return the divergence of a model from another; show progress unless quiet."""
    from halve.api import compare
    from halve.cli.progress import progress_bar

    with progress_bar(quiet) as show:
        options = replace(options, progress=lambda p: show(_step(p, model, against)))
        return compare(model, against, options=options)


def _as_json(record: "PerplexityRecord | ComparisonRecord | TasksRecord") -> str:
    from halve.records import TasksRecord
    from halve.records.codec import to_json

    if isinstance(record, TasksRecord):
        return task_scores_as_json(record)
    return to_json(asdict(record))


def _print(
    record: "PerplexityRecord | ComparisonRecord | TasksRecord",
    model: str,
    against: str | None,
) -> None:
    from halve.records import PerplexityRecord, TasksRecord

    if isinstance(record, TasksRecord):
        print_task_scores(record, model, against)
    elif isinstance(record, PerplexityRecord):
        _print_perplexity(record, model)
    else:
        print_comparison(record, model, against)


def _step(progress: "Progress", model: str, against: str | None) -> "Step":
    """Return what is shown of an evaluation, of one model or of two in turn."""
    from halve.cli.progress import Step
    from halve.evaluation import REFERENCE

    is_reference = progress.phase == REFERENCE
    name = _shown(model)
    if against is not None and is_reference:
        name = _shown(against) if _shown(against) != name else REFERENCE
    done = progress.block + is_reference * progress.blocks
    total = progress.blocks * (1 if against is None else 2)
    return Step(
        f"{name}, block {progress.block + 1} of {progress.blocks}",
        done / total,
    )


def _shown(model: str) -> str:
    """Return the last part of a model's path or name, for a line of progress."""
    from pathlib import PurePath

    from halve.untrusted import truncated

    return truncated(PurePath(model).name or model, _LONGEST_NAME)


def _print_perplexity(record: "PerplexityRecord", model: str) -> None:
    print(f"{model}: perplexity {_with_error(record)}")
    _print_basis(record)


def _with_error(record: "PerplexityRecord") -> str:
    if record.standard_error is None:
        return f"{record.perplexity:.4f} (of one segment, without a standard error)"
    return f"{record.perplexity:.4f} +/- {record.standard_error:.4f}"


def _print_basis(record: "PerplexityRecord") -> None:
    from halve.cli.console import duration

    bos = "" if record.bos is None else " after BOS"
    print(
        f"{record.data}: {record.tokens} tokens predicted, {record.segments} segments "
        f"of {record.seq_len}{bos}, {duration(record.seconds)}"
    )


def print_comparison(
    record: "ComparisonRecord", model: str, against: str | None
) -> None:
    """Print the perplexity of both models, and how far the first diverges."""
    print(f"{against}: perplexity {_with_error(record.reference)}")
    print(f"{model}: perplexity {_with_error(record.model)}")
    print(
        f"KL divergence: mean {record.kl_mean:.6f}{_plus_minus(record.kl_error, 6)}, "
        f"median {record.kl_median:.6f}, 99% {record.kl_99:.6f}, "
        f"99.9% {record.kl_quantiles['99.9']:.6f}, maximum {record.kl_max:.6f}"
    )
    error = record.agreement_error
    error = None if error is None else 100 * error
    print(
        f"Same most likely token: {100 * record.agreement:.2f}%{_plus_minus(error, 2)} "
        "of tokens"
    )
    _print_basis(record.model)


def _plus_minus(error: float | None, digits: int) -> str:
    return "" if error is None else f" +/- {error:.{digits}f}"
