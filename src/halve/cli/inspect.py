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
    from halve.cli.console import percent, print_table, size
    from halve.measure import inspect_model
    from halve.records.codec import to_json

    inspection = inspect_model(model, trust_remote_code)
    if as_json:
        print(to_json(asdict(inspection) | {"sparsity": inspection.sparsity}))
        return
    rows = [
        (
            matrix.tensor,
            f"{matrix.rows} x {matrix.columns}",
            matrix.dtype,
            percent(matrix.sparsity),
            matrix.pattern,
            size(matrix.bytes),
            _storage(matrix),
        )
        for matrix in inspection.matrices
    ]
    columns = ["matrix", "shape", "dtype", "sparsity", "pattern", "size", "stored"]
    print_table("", columns, rows)
    prunable = sum(matrix.bytes for matrix in inspection.matrices)
    zeros = percent(inspection.zeros / inspection.parameters)
    print(f"Prunable matrices: {percent(inspection.sparsity)} zeros, {size(prunable)}")
    print(
        f"Whole model: {inspection.parameters:,} parameters, {zeros} zeros, "
        f"{size(inspection.bytes)}"
    )


def _storage(matrix: "MatrixInspection") -> str:
    """Return how a matrix is stored, and its packed size if it is dense."""
    if matrix.storage != "dense":
        return matrix.storage
    dense = matrix.bytes
    if matrix.packed_bytes is None or matrix.packed_bytes >= dense:
        return "dense (packing would not shrink it)"
    return f"dense (packed: {100 * matrix.packed_bytes / dense:.1f}%)"
