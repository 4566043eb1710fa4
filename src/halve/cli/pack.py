"""`halve pack` and `halve unpack`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from halve.cli.options import Json, Model, Out, Quiet, with_options
from halve.options import PackOptions, TrustRemoteCode

if TYPE_CHECKING:
    from halve.cli.progress import Show
    from halve.records import PackRecord, Progress

PACK_EXAMPLES = """
**Examples**

`halve pack ./opt-125m-half -o ./opt-125m-packed`

`halve pack ./llama-24 -o ./llama-24-packed --json`
"""
UNPACK_EXAMPLES = """
**Examples**

`halve unpack ./opt-125m-packed -o ./opt-125m-dense`
"""


@with_options()
def pack(
    model: Model,
    out: Out,
    options: PackOptions,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store a pruned model compactly: a bit per weight, and the nonzero weights."""
    from halve.cli.console import print_next
    from halve.cli.progress import progress_bar
    from halve.packing import pack_model

    with progress_bar(quiet) as show:
        record = pack_model(model, out, _reporting(options, show))
    _print(record, as_json)
    if not as_json:
        print_next(("bench", out), ("generate", out, "Once upon a time"))


@with_options()
def unpack(
    model: Model,
    out: Out,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store a packed or quantized model dense."""
    from halve.cli.progress import progress_bar
    from halve.packing import unpack_model

    options = PackOptions(False, trust_remote_code)
    with progress_bar(quiet) as show:
        record = unpack_model(model, out, _reporting(options, show))
    _print(record, as_json)


def _reporting(options: PackOptions, show: "Show") -> PackOptions:
    """Return options under which each file is reported on the progress bar."""
    from halve.cli.progress import Step

    def report(progress: "Progress") -> None:
        text = f"file {progress.block + 1} of {progress.blocks}: {progress.phase}"
        show(Step(text, progress.block / progress.blocks))

    return replace(options, progress=report)


def _print(record: "PackRecord", as_json: bool) -> None:
    from halve.cli.console import duration, local_time, percent, size

    if as_json:
        print(record.to_json(), end="")
        return
    dense = [m.tensor for m in record.matrices if not m.packed]
    count, packed = len(record.matrices), len(record.matrices) - len(dense)
    fraction = percent(record.stored_bytes / record.dense_bytes)
    before, after = size(record.dense_bytes), size(record.stored_bytes)
    if record.kind == "unpack":
        print(f"{count} matrices are dense: {after}.")
    else:
        print(
            f"{packed} of {count} matrices are packed: {after}, {fraction} of {before}."
        )
        if minus_zeros := sum(matrix.minus_zeros for matrix in record.matrices):
            print(
                f"{minus_zeros:,} negative zeros are stored, bit for bit; "
                "--positive-zeros saves their bytes."
            )
        if dense:
            print(f"Left dense (packing would not shrink them): {', '.join(dense)}.")
    print(
        f"Finished at {local_time(record.finished)}, after {duration(record.seconds)}."
    )
