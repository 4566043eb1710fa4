"""`halve inspect`."""

from dataclasses import asdict

from halve.cli import options

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
        )
        for matrix in found.matrices
    ]
    columns = ["matrix", "shape", "dtype", "sparsity", "pattern", "size"]
    print_table("", columns, rows)
    prunable = sum(matrix.bytes for matrix in found.matrices)
    print(f"Prunable matrices: {percent(found.sparsity)} zeros, {size(prunable)}")
    print(
        f"Whole model: {found.parameters:,} parameters, "
        f"{percent(found.zeros / found.parameters)} zeros, {size(found.bytes)}"
    )
