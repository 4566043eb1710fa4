"""`halve demo`: the whole road on the model that comes with Halve."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = """
**Examples**

`halve demo`

`halve demo --out demo-models`
"""

# (solver, sparsity) of each row, in the order of the table.
_ROWS = (
    ("magnitude", "50%"),
    ("wanda", "50%"),
    ("sparsegpt", "50%"),
    ("sparsegpt", "2:4"),
)
_SEGMENTS = 300


def command(
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="Keep the pruned models here; thrown away by default.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Prune the bundled model four ways and compare what is left of it.

    The model knows Python. It is calibrated on modules of this Python's library and
    judged on others, which it was not trained on.
    """
    import json

    with _model() as model, _folder(out) as folder:
        rows = [_row("dense", "", str(model), None)]
        rows += [_pruned(model, folder, *row) for row in _ROWS]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)


@contextmanager
def _model() -> "Iterator[Path]":
    from importlib.resources import as_file, files

    with as_file(files("halve") / "data" / "pycode-opt") as folder:
        yield folder


@contextmanager
def _folder(out: str | None) -> "Iterator[Path]":
    from pathlib import Path
    from tempfile import TemporaryDirectory

    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory(prefix="halve-demo-") as folder:
        yield Path(folder)


def _pruned(
    model: "Path", folder: "Path", solver: str, sparsity: str
) -> dict[str, object]:
    from halve.api import prune

    print(f"pruning: {solver} {sparsity}", file=sys.stderr, flush=True)
    target = folder / f"{solver}-{sparsity.replace(':', '-').strip('%')}"
    record = prune(
        model, target, sparsity=sparsity, solver=solver, calibration="stdlib"
    )
    return _row(solver, sparsity, str(target), record.seconds)


def _row(
    solver: str, sparsity: str, model: str, seconds: float | None
) -> dict[str, object]:
    from halve.api import inspect, perplexity

    print(f"judging: {solver} {sparsity}", file=sys.stderr, flush=True)
    judged = perplexity(model, data="stdlib", segments=_SEGMENTS)
    found = inspect(model)
    return {
        "model": f"{solver} {sparsity}".strip(),
        "sparsity": found.sparsity,
        "perplexity": judged.perplexity,
        "standard_error": judged.standard_error,
        "bytes": found.bytes,
        "prune_seconds": seconds,
    }


def _print(rows: list[dict]) -> None:
    from halve.cli.console import duration, percent, print_table, size

    print_table(
        f"pycode-opt on {_SEGMENTS} held-out segments of 256 tokens",
        ["model", "sparsity", "perplexity", "+/-", "bytes", "time to prune"],
        [
            (
                row["model"],
                percent(row["sparsity"]),
                f"{row['perplexity']:.2f}",
                f"{row['standard_error']:.2f}",
                size(row["bytes"]),
                "-" if row["prune_seconds"] is None else duration(row["prune_seconds"]),
            )
            for row in rows
        ],
    )
