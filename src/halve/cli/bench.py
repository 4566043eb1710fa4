"""`halve bench`."""

import os
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from halve.records import BenchRecord

EXAMPLES = """
**Examples**

`halve bench ./opt-125m-packed`

`halve bench --random-llama 1.2b`

`halve bench --random-opt 1.3b --sparsity 70% --tg 32 --rounds 3 --output json`
"""


class Output(StrEnum):
    """How the table is printed."""

    md = "md"
    csv = "csv"
    json = "json"


def command(  # noqa: PLR0913, PLR0917  (one parameter for each option)
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A pruned model, dense or packed: folder or name."
        ),
    ] = None,
    random_llama: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="A random Llama instead: 110m, 1.2b or 7b."),
    ] = None,
    random_opt: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="A random OPT instead: 125m, 1.3b or 6.7b."),
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Of the random model.")] = "50%",
    prompt: Annotated[
        int | None,
        typer.Option(
            "--pp",
            help="Tokens of the prompt, 0 for none. [512, or what the model takes]",
            min=0,
            show_default=False,
        ),
    ] = None,
    generated: Annotated[
        int | None,
        typer.Option(
            "--tg",
            help="Tokens generated, 0 for none. [128, or what the model takes]",
            min=0,
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            help="Sequences decoded at once; may be repeated. [1, 4, 16]",
            show_default=False,
            min=1,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions.", min=1)] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            help="torch's own choice by default.",
            show_default=False,
            min=1,
            max=4 * (os.cpu_count() or 1),
        ),
    ] = None,
    output: Annotated[Output, typer.Option(help="Format of the table.")] = Output.md,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Time a model dense in torch, dense in Halve's kernel, and packed.

    The rounds are interleaved; the table has mean and deviation, the ratio is that of
    the medians. Also shown: the bytes of weights that a token reads, the share of the
    memory's bandwidth, and the peak memory of loading and running each.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from halve.cli.console import progress_line
    from halve.measure import run_bench
    from halve.options import BenchOptions

    disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    randoms = {"llama": random_llama, "opt": random_opt}
    with (
        progress_line(quiet) as show,
        _source(model, randoms, sparsity, show) as (name, source),
        _both(source, trust_remote_code, show) as (dense, packed),
    ):
        task = BenchOptions(
            name=name,
            dense=dense,
            packed=packed,
            prompt=prompt,
            generated=generated,
            batches=tuple(batch or (1, 4, 16)),
            rounds=rounds,
            trust_remote_code=trust_remote_code,
        )
        record = run_bench(task, show)
    _print(record, output)


@contextmanager
def _source(
    model: str | None,
    randoms: "dict[str, str | None]",
    sparsity: str,
    show: "Callable[[str], None]",
) -> "Iterator[tuple[str, Path]]":
    """Lend the model that the command line names, made at random where it says so."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from halve.checkpoint import resolve_model
    from halve.measure import write_random_model
    from halve.patterns import parse_pattern

    chosen = [(family, size) for family, size in randoms.items() if size is not None]
    if len(chosen) + (model is not None) != 1:
        raise typer.BadParameter("name a MODEL, or one --random-llama or --random-opt")
    if model is not None:
        yield model, resolve_model(model)
        return
    (family, size), pattern = chosen[0], parse_pattern(sparsity)
    with TemporaryDirectory(prefix="halve-bench-") as folder:
        show(f"making a random {family} {size}")
        write_random_model(Path(folder), family, size, pattern)
        yield f"random {family} {size}, {sparsity} zeros", Path(folder)


@contextmanager
def _both(
    source: "Path", trust_remote_code: bool, show: "Callable[[str], None]"
) -> "Iterator[tuple[Path, Path]]":
    """Lend a model dense and packed, the one that is not there made for a while."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from halve.checkpoint import Checkpoint
    from halve.options import PackOptions
    from halve.packing import pack_model, unpack_model

    with TemporaryDirectory(prefix="halve-bench-") as folder:
        other = Path(folder) / "model"
        if Checkpoint.open(source).is_packed:
            show("unpacking")
            unpack_model(source, other, PackOptions(False, trust_remote_code))
            yield other, source
        else:
            show("packing")
            # Minus zeros do not change how fast a model is.
            pack_model(source, other, PackOptions(True, trust_remote_code))
            yield source, other


def _print(record: "BenchRecord", output: Output) -> None:
    """Print the table, with the columns of llama-bench first."""
    import csv
    import json
    import sys
    from dataclasses import asdict

    if output is Output.json:
        print(json.dumps(asdict(record), indent=2))
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
    "weights read a token",
    "share of bandwidth",
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

    print(f"\n{record.cpu}: {record.bandwidth / 1e9:.1f} GB/s read from memory.")
    for kind, found in record.footprints.items():
        print(
            f"Peak memory, {kind}: {size(found.loaded)} loaded, {size(found.run)} run, "
            f"of which the interpreter {size(found.interpreter)}."
        )
