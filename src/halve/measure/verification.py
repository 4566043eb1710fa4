"""Whether an output is what was written: to the byte, and in what was promised.

Digests tell every change since `halve.json` was written; the promises, counted in the
tensors, tell whether that was right. It does not tell who wrote it: whoever can change
a file can write a new record for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halve.checkpoint import RECORD, Checkpoint, locate, sha256
from halve.errors import CheckpointError, PatternError, QuantizationError
from halve.grids import QuantScheme, grid_shortfall
from halve.measure.inspection import matrices_of
from halve.patterns import NM, parse_pattern
from halve.records import (
    Finding,
    MatrixRecord,
    MatrixStorage,
    PackRecord,
    PruneRecord,
    Verification,
    parse_record,
)
from halve.records.codec import is_sealed

_REMEDY = "Make the model again, or copy the file from where it is whole."


@dataclass(frozen=True)
class _Promise:
    """What a record says of one matrix.

    Attributes:
        shape: [rows, columns].
        sparsity: Share of zeros, exactly.
        pattern: n:m, where it is that.
        grid: Where its values were rounded.
    """

    shape: tuple[int, int]
    sparsity: float
    pattern: NM | None
    grid: QuantScheme | None

    @classmethod
    def of(cls, matrix: MatrixRecord | MatrixStorage) -> "_Promise":
        # Of other patterns, the exact number of zeros says more.
        pattern = parse_pattern(matrix.pattern) if ":" in matrix.pattern else None
        grid = QuantScheme(**matrix.grid) if matrix.grid else None
        assert pattern is None or isinstance(pattern, NM)
        shape = (matrix.rows, matrix.columns)
        return cls(shape, float(matrix.sparsity), pattern, grid)

    def broken(self, name: str, weight: Tensor) -> str | None:
        """Return how a [rows, columns] matrix falls short of it, if it does."""
        if tuple(weight.shape) != self.shape:
            return f"it is {list(weight.shape)}, not {list(self.shape)}"
        sparsity = float((weight == 0).double().mean())
        if sparsity != self.sparsity:
            return f"{sparsity:.4%} of its weights are zero, not {self.sparsity:.4%}"
        if self.pattern is not None:
            self.pattern.check_fits(name, weight.shape[1])
            if (lost := self.pattern.shortfall(weight)) is not None:
                return lost
        return self.grid and grid_shortfall(self.grid, weight)


@dataclass(frozen=True)
class _Record:
    """What a `halve.json` says, as far as it can be held against the files."""

    shards: dict[str, str]
    files: dict[str, str]
    promises: dict[str, _Promise]

    @classmethod
    def of(cls, record: PruneRecord | PackRecord) -> "_Record":
        own = cls(
            dict(record.shards),
            dict(record.files),
            {matrix.tensor: _Promise.of(matrix) for matrix in record.all_matrices},
        )
        if any(Path(name).name != name for name in own.shards | own.files):
            raise ValueError("a path in the place of a name")
        return own


def verify_output(out: str | Path, trust_remote_code: bool = False) -> Verification:
    """Compare an output with its record; see `halve.verify` for the contract."""
    folder = locate(out)
    record = _read(folder)
    digests = record.shards | record.files
    damaged = [
        Finding(name, problem)
        for name, digest in digests.items()
        if (problem := _damage(folder / name, digest)) is not None
    ]
    findings = damaged or list(_broken(folder, record, trust_remote_code))
    return Verification(
        folder=str(folder),
        files=len(digests),
        bytes=sum(_size(folder / name) for name in digests),
        matrices=0 if damaged else len(record.promises),
        findings=tuple(findings),
    )


def _read(folder: Path) -> _Record:
    path = folder / RECORD
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {RECORD} in {folder}, which would say what was written.",
            "Name a folder that Halve has made.",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", _REMEDY) from error
    if not is_sealed(data):
        raise CheckpointError(
            f"{path} is not what was written: its own digest does not match.", _REMEDY
        )
    return _parsed(path, data)


def _parsed(path: Path, data: bytes) -> _Record:
    try:
        return _Record.of(parse_record(data.decode()))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as why:
        raise CheckpointError(f"{path} cannot be read ({why!r}).", _REMEDY) from why
    except (QuantizationError, PatternError) as error:
        raise CheckpointError(f"{path}: {error.problem}", _REMEDY) from error


def _damage(path: Path, digest: str) -> str | None:
    """Return what is wrong with the bytes of a file, if anything is."""
    if not path.is_file():
        return "it is not there"
    try:
        found = sha256(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if found == digest else "its bytes are not those that were written"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _broken(
    folder: Path, record: _Record, trust_remote_code: bool
) -> Iterator[Finding]:
    """Yield what the tensors do not keep of what was promised."""
    checkpoint = Checkpoint.open(folder)
    if strangers := sorted({*checkpoint.shards} - record.shards.keys()):
        for name in strangers:
            yield Finding(name, "it is loaded, but nothing is recorded of it")
        return
    matrices = matrices_of(folder, checkpoint, trust_remote_code)
    for name in sorted(matrices.keys() ^ record.promises.keys()):
        yield Finding(name, "it is in the model or in the record, but not in both")
    for name in (name for name in matrices if name in record.promises):
        weight = matrices[name].as_rows(checkpoint.read([name])[name])
        if (problem := record.promises[name].broken(name, weight)) is not None:
            yield Finding(name, problem)
