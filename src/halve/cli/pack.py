"""`halve pack` and `halve unpack`."""

from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from halve.options import PackOptions
    from halve.records import PackRecord

PACK_EXAMPLES = """
**Examples**

`halve pack ./opt-125m-half -o ./opt-125m-packed`

`halve pack ./llama-24 -o ./llama-24-packed --json`
"""
UNPACK_EXAMPLES = """
**Examples**

`halve unpack ./opt-125m-packed -o ./opt-125m-dense`
"""

Out = Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="The new folder.")]


def pack(
    model: options.Model,
    out: Out,
    positive_zeros: Annotated[
        bool,
        typer.Option(
            "--positive-zeros",
            help="Drop minus zeros, too, which multiplying by a mask leaves behind.",
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store a pruned model small: a bit for each weight beside what is kept."""
    from halve.cli.console import progress_line
    from halve.options import PackOptions
    from halve.packing import pack_model

    options = PackOptions(positive_zeros, trust_remote_code)
    with progress_line(quiet) as show:
        record = pack_model(model, out, _reporting(options, show))
    _print(record, as_json)


def unpack(
    model: options.Model,
    out: Out,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store a packed model dense again, bit for bit."""
    from halve.cli.console import progress_line
    from halve.options import PackOptions
    from halve.packing import unpack_model

    options = PackOptions(False, trust_remote_code)
    with progress_line(quiet) as show:
        record = unpack_model(model, out, _reporting(options, show))
    _print(record, as_json)


def _reporting(options: "PackOptions", show: "Callable[[str], None]") -> "PackOptions":
    """Return options under which each file is reported on the progress line."""
    from dataclasses import replace

    return replace(
        options,
        progress=lambda p: show(f"file {p.block + 1} of {p.blocks}: {p.phase}"),
    )


def _print(record: "PackRecord", as_json: bool) -> None:
    from halve.cli.console import duration, percent, size

    if as_json:
        print(record.to_json(), end="")
        return
    dense = [m.tensor for m in record.matrices if not m.packed]
    count, packed = len(record.matrices), len(record.matrices) - len(dense)
    share = percent(record.stored_bytes / record.dense_bytes)
    before, after = size(record.dense_bytes), size(record.stored_bytes)
    if record.kind == "unpack":
        print(f"{count} matrices are dense: {after}.")
    else:
        print(f"{packed} of {count} matrices are packed: {after}, {share} of {before}.")
        if minus_zeros := sum(matrix.minus_zeros for matrix in record.matrices):
            print(
                f"{minus_zeros:,} zeros have a minus sign and are kept, bit for bit; "
                "--positive-zeros drops them."
            )
        if dense:
            print(f"Dense, as packing would not shrink them: {', '.join(dense)}.")
    print(f"Finished {record.finished}, after {duration(record.seconds)}.")
