"""`halve inspect`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from halve.cli.options import Json, Model, with_options
from halve.options import TrustRemoteCode

if TYPE_CHECKING:
    from halve.records import MatrixInspection

EXAMPLES = """
**Examples**

`halve inspect ./opt-125m-half`

`halve inspect facebook/opt-125m --json`
"""


@with_options()
def command(
    model: Model,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Count sparsity, pattern and bytes of every prunable matrix in a model's files."""
    import json

    from halve.cli.console import percent, print_table, size
    from halve.measure import inspect_model

    inspection = inspect_model(model, trust_remote_code)
    if as_json:
        print(
            json.dumps(asdict(inspection) | {"sparsity": inspection.sparsity}, indent=2)
        )
        return
    rows = [_row(*group) for group in inspection.grouped()]
    columns = ["matrix", "shape", "dtype", "sparsity", "pattern", "size", "stored"]
    print_table("", columns, rows)
    prunable = sum(matrix.bytes for matrix in inspection.matrices)
    zeros = percent(inspection.zeros / inspection.parameters)
    print(f"Prunable matrices: {percent(inspection.sparsity)} zeros, {size(prunable)}")
    print(
        f"Whole model: {inspection.parameters:,} parameters, {zeros} zeros, "
        f"{size(inspection.bytes)}"
    )


def _row(title: str, matrices: "list[MatrixInspection]") -> tuple[str, ...]:
    """Return the row of a matrix, or of the same matrix of all experts of a block."""
    from halve.cli.console import percent, size

    first = matrices[0]
    sparsities = sorted(matrix.sparsity for matrix in matrices)
    shown = dict.fromkeys(percent(value) for value in (sparsities[0], sparsities[-1]))
    patterns = {matrix.pattern for matrix in matrices}
    return (
        title,
        f"{first.rows} x {first.columns}",
        first.dtype,
        " to ".join(shown),
        first.pattern if len(patterns) == 1 else "several",
        size(sum(matrix.bytes for matrix in matrices)),
        _storage(first),
    )


def _storage(matrix: "MatrixInspection") -> str:
    """Return how a matrix is stored, and its packed size if it is dense."""
    if matrix.packed:
        return matrix.storage
    dense = matrix.bytes
    if matrix.packed_bytes is None or matrix.packed_bytes >= dense:
        return "dense (packing would not shrink it)"
    return f"dense (packed: {100 * matrix.packed_bytes / dense:.1f}%)"
