"""`halve bench`."""

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.options import Quiet, with_options
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

    md = "md"
    csv = "csv"
    json = "json"


@with_options(panels=True)
def command(
    options: BenchOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A pruned model, dense or packed: folder or name."
        ),
    ] = None,
    output: Annotated[Output, Option("Format of the table.", OUTPUT)] = Output.md,
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
    from transformers.utils.logging import disable_progress_bar

    from halve.api import bench
    from halve.cli.console import progress_line

    if not options.names_one_model(model):
        raise typer.BadParameter("name a MODEL, or one --random-llama or --random-opt")
    disable_progress_bar()
    with progress_line(quiet) as show:
        record = bench(model, options=replace(options, progress=show))
    _print(record, output)


def _print(record: "BenchRecord", output: Output) -> None:
    """Print the table, whose first columns are those of llama-bench."""
    import csv
    import sys
    from dataclasses import asdict

    from halve.records.codec import to_json

    if output is Output.json:
        print(to_json(asdict(record)))
        return
    rows = [_COLUMNS, *_rows(record)]
    if output is Output.csv:
        csv.writer(sys.stdout).writerows(rows)
        return
    print(f"| {' | '.join(_COLUMNS)} |")
    print("|---|" + "--:|" * (len(_COLUMNS) - 1))
    for row in rows[1:]:
        print(f"| {' | '.join(row)} |")
    _print_notes(record)


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


def _rows(record: "BenchRecord") -> "Iterator[tuple[str, ...]]":
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
