"""`halve pack` and `halve unpack`."""

from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
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
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store a pruned model small: a bit for each weight beside what is kept."""
    record = _rewrite("pack", model, out, trust_remote_code, quiet)
    _print(record, as_json)


def unpack(
    model: options.Model,
    out: Out,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Store a packed model dense again, bit for bit."""
    record = _rewrite("unpack", model, out, trust_remote_code, quiet)
    _print(record, as_json)


def _rewrite(
    kind: str, model: str, out: str, trust_remote_code: bool, quiet: bool
) -> "PackRecord":
    from halve.cli.console import progress_line
    from halve.packing import Rewriting, rewrite_model

    with progress_line(quiet) as show:
        rewriting = Rewriting(
            kind,
            trust_remote_code,
            lambda p: show(f"file {p.block + 1} of {p.blocks}: {p.phase}"),
        )
        return rewrite_model(model, out, rewriting)


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
        if dense:
            print(f"Dense, as packing would not shrink them: {', '.join(dense)}.")
    print(f"Finished {record.finished}, after {duration(record.seconds)}.")
