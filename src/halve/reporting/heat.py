"""The cells of a heat map: a row for each block, a column for each matrix."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from halve.records import BlockRecord, MatrixRecord
from halve.reporting.numbers import percent, significant

# More columns than these are experts, of which those of one name become one cell.
_MAX_COLUMNS = 14
# The name of a matrix within its block, in the name of its tensor.
_WITHIN = re.compile(r"(?:.*?\.)?\d+\.(.+?)(?:\.weight)?")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])")


@dataclass(frozen=True)
class Cell:
    """One matrix, or the experts of one name.

    Attributes:
        value: What its colour shows; None if that was not measured.
        title: Its name and numbers.
    """

    value: float | None
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Values of all matrices.

    Attributes:
        rows: Labels of the blocks: their numbers.
        columns: Short names of the matrices.
        cells: For each block a cell in each column; None where it has no such matrix.
        lowest: The value without colour: 0, or the smallest one.
        highest: The largest value.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    lowest: float
    highest: float

    def strength(self, value: float | None) -> float:
        """Return the opacity of a value's colour, which grows as the root of it."""
        if value is None or self.highest <= self.lowest:
            return 0.04
        part = (value - self.lowest) / (self.highest - self.lowest)
        return 0.04 + 0.96 * max(part, 0.0) ** 0.5

    def legend(self) -> list[float]:
        """Return five values whose colours are evenly spaced."""
        span = self.highest - self.lowest
        return [self.lowest + span * step**2 / 16 for step in range(5)]


Value = Callable[[MatrixRecord], float | None]
Describe = Callable[[MatrixRecord], str]


def error_of(matrix: MatrixRecord) -> float | None:
    """Return the error on held-out inputs, or that on calibration inputs."""
    return matrix.error if matrix.held_out is None else matrix.held_out


def sparsity_of(matrix: MatrixRecord) -> float:
    """Return the fraction of zeros."""
    return matrix.sparsity


def heat_map(
    blocks: Sequence[BlockRecord],
    value: Value,
    describe: Describe,
    from_zero: bool = True,
) -> HeatMap:
    """Return the map of a value of all matrices.

    Args:
        blocks: The blocks.
        value: What the colour of a matrix shows.
        describe: What a pointer over it shows, beside its name.
        from_zero: Whether colours begin at 0, rather than at the smallest value.
    """
    names = _names(blocks)
    short = _short_names(names)
    grouped = [_by_name(block, names) for block in blocks]
    cells = tuple(
        tuple(_cell(group.get(name, []), value, describe) for name in names)
        for group in grouped
    )
    values = [c.value for row in cells for c in row if c and c.value is not None]
    return HeatMap(
        rows=tuple(str(index) for index in range(len(blocks))),
        columns=short,
        cells=cells,
        lowest=0.0 if from_zero else min(values, default=0.0),
        highest=max(values, default=0.0),
    )


def matrix_rows(blocks: Sequence[BlockRecord]) -> list[tuple[str, ...]]:
    """Return the map as a table: name, shape, zeros, error, solver, runner-up.

    Experts of one name have one row, with means.
    """
    names = _names(blocks)
    groups = [group for b in blocks for group in _by_name(b, names).values()]
    return [_row(group) for group in groups]


def _row(matrices: Sequence[MatrixRecord]) -> tuple[str, ...]:
    first = matrices[0]
    name = first.tensor
    if len(matrices) > 1:
        name = f"{_starred(name)}, {len(matrices)} experts"
    errors = [error for m in matrices if (error := error_of(m)) is not None]
    runners_up = [m.runner_up for m in matrices if m.runner_up is not None]
    return (
        name,
        f"{first.rows} x {first.columns}",
        percent(fmean(m.sparsity for m in matrices)),
        percent(fmean(errors)) if errors else "",
        ", ".join(dict.fromkeys(m.solver for m in matrices)),
        percent(fmean(runners_up)) if runners_up else "",
    )


def within_block(tensor: str) -> str:
    """Return the name of a matrix within its block."""
    match = _WITHIN.fullmatch(tensor)
    return match[1] if match else tensor


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name)


def _names(blocks: Sequence[BlockRecord]) -> list[str]:
    """Return the columns: names within a block, those of experts with a star."""
    every = [within_block(m.tensor) for block in blocks for m in block.matrices]
    names = list(dict.fromkeys(every))
    if len(names) <= _MAX_COLUMNS:
        return names
    return list(dict.fromkeys(_starred(name) for name in names))


def _by_name(block: BlockRecord, names: list[str]) -> dict[str, list[MatrixRecord]]:
    groups: dict[str, list[MatrixRecord]] = {}
    for matrix in block.matrices:
        name = within_block(matrix.tensor)
        name = name if name in names else _starred(name)
        groups.setdefault(name, []).append(matrix)
    return groups


def _short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the last parts of names where these differ, else the whole names."""
    last = [name.rpartition(".")[2] for name in names]
    return tuple(last if len(set(last)) == len(last) else names)


def _cell(
    matrices: Sequence[MatrixRecord], value: Value, describe: Describe
) -> Cell | None:
    if not matrices:
        return None
    if len(matrices) == 1:
        first = matrices[0]
        return Cell(value(first), f"{_module(first.tensor)} {describe(first)}")
    values = [found for m in matrices if (found := value(m)) is not None]
    name = _starred(_module(matrices[0].tensor))
    title = f"{name}: {len(matrices)} experts"
    if not values:
        return Cell(None, title)
    mean, highest = fmean(values), max(values)
    return Cell(mean, f"{title}, mean {percent(mean)}, maximum {percent(highest)}")


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def zeros_text(matrix: MatrixRecord) -> str:
    """Return the fraction of zeros of a matrix."""
    return f"{percent(matrix.sparsity)} zeros"


def all_numbers(matrix: MatrixRecord) -> str:
    """Return shape, zeros, error and solver of a matrix."""
    parts = [f"{matrix.rows} x {matrix.columns}", zeros_text(matrix)]
    if (error := error_of(matrix)) is not None:
        parts.append(f"error {percent(error)}")
    if matrix.solver:
        parts.append(matrix.solver)
    if matrix.runner_up is not None:
        parts.append(f"runner-up {percent(matrix.runner_up)}")
    if matrix.bits is not None:
        parts.append(f"{significant(matrix.bits)} bits")
    return ", ".join(parts)
