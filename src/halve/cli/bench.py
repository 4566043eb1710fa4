"""`halve bench`."""

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.options import Keep, Quiet, check_model, with_options
from halve.option import OUTPUT, Option
from halve.options import BenchOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from halve.records import BenchRecord

EXAMPLES = """
**Examples**

`halve bench ./opt-125m-packed`

`halve bench --random-llama 1.2b`

`halve bench --random-opt 1.3b --sparsity 70% --tg 32 --rounds 3 --output json`

`halve bench --random-llama 8b --device cuda`
"""


class Output(StrEnum):
    """Formats of the table."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


@with_options(panels=True)
def command(
    options: BenchOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A pruned model, dense or packed: folder or name.",
            callback=check_model,
        ),
    ] = None,
    output: Annotated[
        Output | None,
        Option(
            "Format of the result.",
            OUTPUT,
            unset="table on a terminal, md elsewhere",
        ),
    ] = None,
    keep: Keep = False,
    quiet: Quiet = False,
) -> None:
    """Time a model dense in torch, dense in Halve's kernel, and packed.

    The rounds are interleaved. All decode with the same cache and the same attention.
    On a GPU (--device cuda) dense in torch and packed are timed, both as CUDA graphs.
    On the CPU Halve's two also run Llama and its like in one call a token; torch's
    products are called by transformers. The table has means and standard
    deviations; the ratio is that of the medians. It also shows the bytes of weights
    that a token reads, the fraction of the memory bandwidth that this takes, and the
    peak memory of loading and running each.
    """
    if not options.names_one_model(model):
        raise typer.BadParameter("name a MODEL, or one --random-llama or --random-opt")
    from transformers.utils.logging import disable_progress_bar

    from halve.api import bench
    from halve.cli.console import print_next
    from halve.cli.progress import Step, progress_bar
    from halve.measure import check_keepable, keep_measurement

    disable_progress_bar()
    folder = check_keepable(model) if keep else None
    with progress_bar(quiet) as show:
        shown = replace(options, progress=lambda text: show(Step(text)))
        record = bench(model, options=shown)
    if folder is not None:
        keep_measurement(folder, record)
    _print(record, output)
    if folder is not None and output is not Output.json:
        print_next(("report", str(folder)))


def _print(record: "BenchRecord", output: Output | None) -> None:
    import sys
    from dataclasses import asdict

    from halve.records.codec import to_json

    if output is None:
        output = Output.table if sys.stdout.isatty() else Output.md
    if output is Output.json:
        print(to_json(asdict(record)))
    elif output is Output.csv:
        _print_csv(record)
    elif output is Output.md:
        _print_markdown(record)
        _print_notes(record)
    else:
        _print_table(record)
        _print_notes(record)


def _print_csv(record: "BenchRecord") -> None:
    import csv
    import sys

    csv.writer(sys.stdout).writerows([_COLUMNS, *_rows(record)])


def _print_markdown(record: "BenchRecord") -> None:
    print(f"| {' | '.join(_COLUMNS)} |")
    print("|---|" + "--:|" * (len(_COLUMNS) - 1))
    for row in _rows(record):
        print(f"| {' | '.join(row)} |")


def _print_table(record: "BenchRecord") -> None:
    """Print the table for a terminal: what is alike in all rows is its title."""
    from halve.cli.console import print_table, size

    title = (
        f"{record.model}, {record.parameters / 1e6:.2f} M parameters, "
        f"{record.threads} threads, kernel {record.kernel}"
    )
    rows = [
        (result.backend, *row[_TEST:])
        for result, row in zip(record.results, _rows(record), strict=True)
    ]
    print_table(title, _SHORT_COLUMNS, rows)
    sizes = ", ".join(f"{name} {size(count)}" for name, count in record.sizes.items())
    print(f"Size: {sizes}.")


_COLUMNS = (
    "model",
    "size",
    "params",
    "backend",
    "threads",
    "test",
    "t/s",
    "ratio",
    "weights read per token",
    "bandwidth used",
)
# Of these, what differs from row to row, under names for a narrow terminal.
_TEST = _COLUMNS.index("test")
_SHORT_COLUMNS = ("backend", "test", "t/s", "ratio", "read", "bandwidth")


def _rows(record: "BenchRecord") -> "Iterator[tuple[str, ...]]":
    """Yield a row for each result; the first columns are those of llama-bench."""
    from halve.cli.console import size
    from halve.measure import TORCH

    base = {r.test: r.median for r in record.results if r.backend == TORCH}
    for result in record.results:
        decodes = result.test.startswith("tg")
        yield (
            record.model,
            size(record.sizes[result.backend]),
            f"{record.parameters / 1e6:.2f} M",
            f"{result.backend} ({record.kernel})"
            if result.backend != TORCH
            else result.backend,
            str(record.threads),
            result.test,
            f"{result.mean:.2f} ± {result.deviation:.2f}",
            f"{result.median / base[result.test]:.2f}",
            size(result.weight_bytes) if decodes else "-",
            f"{100 * result.bandwidth / record.bandwidth:.0f}%" if decodes else "-",
        )


def _print_notes(record: "BenchRecord") -> None:
    from halve.cli.console import size

    bandwidth = f"{record.bandwidth / 1e9:.1f} GB/s"
    if record.gpu:
        print(f"\n{record.gpu}: {bandwidth} copied, reads and writes counted.")
        decoding = {r.decoding for r in record.results if r.test.startswith("tg")}
        if decoding:
            print(f"Tokens were decoded by: {', '.join(sorted(decoding))}.")
    else:
        print(f"\n{record.cpu}: {bandwidth} read from memory.")
    for kind, footprint in record.footprints.items():
        if footprint.gpu_loaded:
            print(
                f"GPU memory, {kind}: {size(footprint.gpu_loaded)} of weights, "
                f"{size(footprint.gpu_peak)} at the peak."
            )
        print(
            f"Peak memory, {kind}: {size(footprint.loaded)} loaded, "
            f"{size(footprint.run)} running, including {size(footprint.interpreter)} "
            "for the interpreter."
        )
