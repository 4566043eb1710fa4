"""`halve demo`: every step, from pruning to running, on the bundled model."""

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from halve.cli.options import Json, with_options
from halve.option import Option

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = """
**Examples**

`halve demo`

`halve demo --out demo-models`
"""

# Solver and sparsity of each row of the table.
_ROWS = (
    ("magnitude", "50%"),
    ("wanda", "50%"),
    ("sparsegpt", "50%"),
    ("auto", "50%"),
    ("auto --refine", "50%"),
    ("sparsegpt", "2:4"),
    ("auto", "2:4"),
)
# The row whose model is packed, run and reported.
_PACKED = ("auto", "50%")
_SEGMENTS = 300
_PROMPT = "def main("
_TOKENS = 24


@with_options()
def command(
    out: Annotated[
        str | None,
        Option(
            "Folder in which to keep the pruned models.",
            unset="a temporary folder",
            flags=("--out", "-o"),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune the bundled model several ways, pack one result, run it, and compare.

    The model is a small language model of Python code. It is calibrated on modules of
    this Python's library and evaluated on others, on which it was not trained.
    """
    from transformers.utils.logging import disable_progress_bar

    from halve.records.codec import to_json

    disable_progress_bar()
    with _model() as model, _folder(out) as folder:
        rows = [_row("dense", "", model, None)]
        rows += [_pruned(model, folder, *row) for row in _ROWS]
        pruned = _target(folder, *_PACKED)
        packed = pruned.with_name(f"{pruned.name}-packed")
        rows.append(_packed(pruned, packed))
        run = _run(packed)
        page = _page(model, packed, None if out is None else packed / "report.html")
    if as_json:
        print(to_json({"models": rows, "run": run, "page": str(page)}))
    else:
        _print(rows)
        _print_run(run)
        print(f"\nWhat was lost, and where, is shown on one page:\n{page}")


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

    _say(f"pruning: {solver} {sparsity}")
    target = _target(folder, solver, sparsity)
    name, _, refine = solver.partition(" ")
    record = prune(
        model,
        target,
        sparsity=sparsity,
        solver=name,
        refine=bool(refine),
        calibration="stdlib",
    )
    return _row(solver, sparsity, target, record.seconds)


def _target(folder: "Path", solver: str, sparsity: str) -> "Path":
    name = f"{solver.replace(' --', '-')}-{sparsity.replace(':', '-').strip('%')}"
    return folder / name


def _packed(pruned: "Path", packed: "Path") -> dict[str, object]:
    from halve.api import pack

    _say("packing")
    record = pack(pruned, packed)
    row = _row(*_PACKED, packed, None)
    fraction = record.stored_bytes / record.dense_bytes
    return row | {"model": f"{row['model']}, packed", "share_of_dense": fraction}


def _run(packed: "Path") -> dict[str, object]:
    """Generate with the packed model, and time it against its dense form."""
    from halve.api import bench, generate
    from halve.measure import keep_measurement

    _say("running")
    text = generate(packed, _PROMPT, max_new_tokens=_TOKENS, device="cpu")
    record = bench(packed, prompt=0, generated=_TOKENS, batches=(1,), device="cpu")
    keep_measurement(packed, record)
    rates = {result.backend: result.median for result in record.results}
    return {"text": text, "tokens_per_second": rates}


def _page(model: "Path", packed: "Path", page: "Path | None") -> "Path":
    """Write the page about the packed model; by default into a folder that stays."""
    from pathlib import Path
    from tempfile import mkdtemp

    from halve.api import report

    _say("reporting")
    return report(
        packed,
        file=str(page or Path(mkdtemp(prefix="halve-report-")) / "report.html"),
        measure=True,
        speed=False,  # measured before
        against=str(model),
        data="stdlib",
        segments=_SEGMENTS,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _row(
    solver: str, sparsity: str, model: "Path", seconds: float | None
) -> dict[str, object]:
    from halve.api import inspect, perplexity

    _say(f"evaluating: {solver} {sparsity}".rstrip())
    evaluated = perplexity(model, data="stdlib", segments=_SEGMENTS)
    inspection = inspect(model)
    return {
        "model": f"{solver} {sparsity}".strip(),
        "sparsity": inspection.sparsity,
        "perplexity": evaluated.perplexity,
        "standard_error": evaluated.standard_error,
        "bytes": inspection.bytes,
        "prune_seconds": seconds,
    }


def _print(rows: list[dict]) -> None:
    from halve.cli.console import duration, percent, print_table, size

    print_table(
        f"pycode-opt on {_SEGMENTS} held-out segments of 256 tokens",
        ["model", "sparsity", "perplexity", "+/-", "size", "time to prune"],
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


def _print_run(run: dict) -> None:
    speeds = ", ".join(f"{k} {v:.0f}" for k, v in run["tokens_per_second"].items())
    print(f"The packed model generates:\n\n{run['text']}\n")
    print(f"Tokens/s at batch 1 (not meaningful for a model this small): {speeds}.")
