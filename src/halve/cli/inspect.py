"""`halve inspect`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from halve.cli import options

if TYPE_CHECKING:
    from halve.records import MatrixInspection

EXAMPLES = """
**Examples**

`halve inspect ./opt-125m-half`

`halve inspect facebook/opt-125m --json`
"""


def command(
    model: options.Model,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Count sparsity, pattern and bytes of every prunable matrix in a model's files."""
    import json

    from halve.cli.console import percent, print_table, size
    from halve.measure import inspect_model

    found = inspect_model(model, trust_remote_code)
    if as_json:
        print(json.dumps(asdict(found) | {"sparsity": found.sparsity}, indent=2))
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
        for matrix in found.matrices
    ]
    columns = ["matrix", "shape", "dtype", "sparsity", "pattern", "size", "stored"]
    print_table("", columns, rows)
    prunable = sum(matrix.bytes for matrix in found.matrices)
    print(f"Prunable matrices: {percent(found.sparsity)} zeros, {size(prunable)}")
    print(
        f"Whole model: {found.parameters:,} parameters, "
        f"{percent(found.zeros / found.parameters)} zeros, {size(found.bytes)}"
    )


def _storage(matrix: "MatrixInspection") -> str:
    """Say how a matrix is stored, and what packing would bring where it is dense."""
    if matrix.packed:
        return "packed"
    dense = matrix.bytes
    if matrix.packed_bytes is None or matrix.packed_bytes >= dense:
        return "dense (packing would not shrink it)"
    return f"dense (packed: {100 * matrix.packed_bytes / dense:.1f}%)"
