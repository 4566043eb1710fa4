"""`halve pack` and `halve unpack`."""

from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
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
    from halve.options import PackOptions

    options = PackOptions("pack", positive_zeros, trust_remote_code)
    record = _rewrite(model, out, options, quiet)
    _print(record, as_json)


def unpack(
    model: options.Model,
    out: Out,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store a packed model dense again, bit for bit."""
    from halve.options import PackOptions

    options = PackOptions("unpack", False, trust_remote_code)
    record = _rewrite(model, out, options, quiet)
    _print(record, as_json)


def _rewrite(model: str, out: str, options: "PackOptions", quiet: bool) -> "PackRecord":
    from dataclasses import replace

    from halve.cli.console import progress_line
    from halve.packing import rewrite_model

    with progress_line(quiet) as show:
        told = replace(
            options,
            progress=lambda p: show(f"file {p.block + 1} of {p.blocks}: {p.phase}"),
        )
        return rewrite_model(model, out, told)


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
