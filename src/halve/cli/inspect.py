"""`halve inspect`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

from halve.cli.options import Json, Model, with_options
from halve.option import OUTPUT, Option
from halve.options import TrustRemoteCode

if TYPE_CHECKING:
    from halve.records import Inspection, MatrixInspection

EXAMPLES = """
**Examples**

`halve inspect ./opt-125m-half`

`halve inspect ./opt-125m-half --all`

`halve inspect facebook/opt-125m --json`
"""

# Columns of the table of blocks that are left out where all blocks are alike.
_OFTEN_ALIKE = ("matrices", "pattern", "stored", "packed")
# The names of a block and of a matrix within it, in the name of a tensor.
_IN_BLOCK = re.compile(r"(.*?\.\d+|\d+)\.(.+?)(?:\.weight)?")


@with_options()
def command(
    model: Model,
    every: Annotated[
        bool,
        Option(
            "Print a line for each matrix, rather than for each block.",
            OUTPUT,
            flags=("--all",),
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Count sparsity, pattern and bytes of every prunable matrix in a model's files."""
    from halve.measure import inspect_model
    from halve.records.codec import to_json

    inspection = inspect_model(model, trust_remote_code)
    if as_json:
        print(to_json(asdict(inspection) | {"sparsity": inspection.sparsity}))
        return
    _print_blocks(inspection.matrices, every)
    _print_totals(inspection)


def _print_blocks(matrices: Sequence["MatrixInspection"], every: bool) -> None:
    from halve.cli.console import print_table

    columns = ["block", "matrices", "zeros", "pattern", "size", "stored", "packed"]
    if every:
        columns[:2] = ["matrix", "shape"]
    rows: list[tuple[str, ...]] = []
    for block, group in groupby(matrices, key=lambda m: _split(m.tensor)[0]):
        members = list(group)
        if every:
            rows += [(block,), *(_matrix_row(*of_name) for of_name in _named(members))]
        else:
            rows.append(_block_row(block, members))
    title = f"Stored in {_joined(m.dtype for m in matrices)}"
    if not every:
        alike = _take_alike(columns, rows)
        title += "".join(f"; {name}: {value}" for name, value in alike.items())
    print_table(title, columns, rows)


def _take_alike(columns: list[str], rows: list[tuple[str, ...]]) -> dict[str, str]:
    """Remove the columns that say the same of every block; return what they say.

    What is left fits into 80 characters. A dash need not be said.
    """
    alike = {
        column: values[0]
        for column, values in zip(columns, zip(*rows, strict=True), strict=True)
        if column in _OFTEN_ALIKE and len(set(values)) == 1
    }
    kept = [i for i, column in enumerate(columns) if column not in alike]
    columns[:] = [columns[i] for i in kept]
    rows[:] = [tuple(row[i] for i in kept) for row in rows]
    return {column: value for column, value in alike.items() if value != "-"}


def _split(tensor: str) -> tuple[str, str]:
    """Return the names of a tensor's block, and of its matrix within the block."""
    match = _IN_BLOCK.fullmatch(tensor)
    return (match[1], match[2]) if match else ("", tensor)


def _named(
    matrices: Sequence["MatrixInspection"],
) -> Iterator[tuple[str, Sequence["MatrixInspection"]]]:
    """Yield names and matrices; those of all experts of a block together."""
    found: dict[str, list[MatrixInspection]] = {}
    for matrix in matrices:
        found.setdefault(matrix.experts or matrix.tensor, []).append(matrix)
    for name, every in found.items():
        own = _split(name)[1]
        yield f"{own}, experts x {len(every)}" if every[0].experts else own, every


def _matrix_row(name: str, matrices: Sequence["MatrixInspection"]) -> tuple[str, ...]:
    first = matrices[0]
    return f"  {name}", f"{first.rows} x {first.columns}", *_counts(matrices)


def _block_row(block: str, matrices: Sequence["MatrixInspection"]) -> tuple[str, ...]:
    return block, str(len(matrices)), *_counts(matrices)


def _counts(matrices: Sequence["MatrixInspection"]) -> Iterator[str]:
    """Yield zeros, pattern, size, storage and packed size of some matrices."""
    from halve.cli.console import size

    yield _zeros(matrices)
    yield _joined(matrix.pattern for matrix in matrices)
    yield size(sum(matrix.bytes for matrix in matrices))
    yield _joined(f"{matrix.storage} {matrix.grid}".rstrip() for matrix in matrices)
    yield _gain(matrices)


def _zeros(matrices: Sequence["MatrixInspection"]) -> str:
    """Return the fraction of zeros; of experts, its range as well."""
    from halve.cli.console import percent

    weights = [matrix.rows * matrix.columns for matrix in matrices]
    zeros = sum(m.sparsity * n for m, n in zip(matrices, weights, strict=True))
    mean = percent(zeros / sum(weights))
    every = sorted(matrix.sparsity for matrix in matrices if matrix.experts)
    spread = [percent(every[0]), percent(every[-1])] if every else [mean]
    return mean if len(set(spread)) == 1 else f"{mean} ({' to '.join(spread)})"


def _gain(matrices: Sequence["MatrixInspection"]) -> str:
    """Return the packed size of dense matrices; `-` if that would not be smaller."""
    packed, dense = _packed_bytes(matrices), sum(m.bytes for m in matrices)
    is_packed = any(matrix.packed for matrix in matrices)
    return "-" if is_packed or packed >= dense else f"{100 * packed / dense:.0f}%"


def _packed_bytes(matrices: Sequence["MatrixInspection"]) -> int:
    """Return the size of dense matrices, each packed if that is smaller."""
    return sum(
        m.bytes if m.packed_bytes is None else min(m.bytes, m.packed_bytes)
        for m in matrices
    )


def _joined(names: Iterable[str]) -> str:
    """Return the different names among some, in their order."""
    return ", ".join(dict.fromkeys(names))


def _print_totals(inspection: "Inspection") -> None:
    from halve.cli.console import percent, size

    prunable = sum(matrix.bytes for matrix in inspection.matrices)
    zeros = percent(inspection.zeros / inspection.parameters)
    print(f"Prunable matrices: {percent(inspection.sparsity)} zeros, {size(prunable)}")
    print(
        f"Whole model: {inspection.parameters:,} parameters, {zeros} zeros, "
        f"{size(inspection.bytes)}"
    )
