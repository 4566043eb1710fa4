"""Compare an output with its record: the bytes of its files, and the matrices in them.

The checksums detect every change since `halve.json` was written; the recorded shapes,
sparsities, patterns and grids, counted again in the tensors, detect what was written
wrong. Neither authenticates the output: whoever can change a file can write a new
record for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from halve.checkpoint import (
    RECORD,
    Checkpoint,
    find_side_files,
    resolve_model,
    sha256,
)
from halve.checkpoint.output import name_record
from halve.errors import CheckpointError, PatternError, QuantizationError
from halve.grids import QuantScheme, grid_shortfall
from halve.layout import group_by_tensor
from halve.measure.inspection import matrices_of
from halve.measure.rule_check import rule_mismatches
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
from halve.records.checksum import has_valid_checksum
from halve.records.version import parse_fields

_REMEDY = "Make the output again, or restore the file from an intact copy."
# Whatever JSON of other contents makes a parser raise.
_PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True)
class _Expected:
    """The recorded properties of one matrix.

    Attributes:
        shape: [rows, columns].
        sparsity: Fraction of zeros. Compared for equality: both sides divide the same
            two integers.
        pattern: The n:m pattern; None where the matrix has another.
        grid: Quantization grid; None where the matrix was not quantized.
    """

    shape: tuple[int, int]
    sparsity: float
    pattern: NM | None
    grid: QuantScheme | None

    @classmethod
    def of(cls, matrix: MatrixRecord | MatrixStorage) -> "_Expected":
        # Of other patterns, the exact sparsity says more.
        pattern = parse_pattern(matrix.pattern) if ":" in matrix.pattern else None
        grid = QuantScheme(**matrix.grid) if matrix.grid else None
        assert pattern is None or isinstance(pattern, NM)
        shape = (matrix.rows, matrix.columns)
        return cls(shape, float(matrix.sparsity), pattern, grid)

    def mismatch(self, name: str, weight: Tensor) -> str | None:
        """Return how a [rows, columns] matrix differs from this; None if it does not.

        Args:
            name: Name of the tensor, for errors.
            weight: The stored matrix, dense.
        """
        if tuple(weight.shape) != self.shape:
            return f"it is {list(weight.shape)}, not {list(self.shape)}"
        sparsity = (weight.numel() - int(weight.count_nonzero())) / weight.numel()
        if sparsity != self.sparsity:
            return f"{sparsity:.4%} of its weights are zero, not {self.sparsity:.4%}"
        if self.pattern is not None:
            self.pattern.check_fits(name, weight.shape[1])
            if (shortfall := self.pattern.shortfall(weight)) is not None:
                return shortfall
        return self.grid and grid_shortfall(self.grid, weight)


@dataclass(frozen=True)
class _Record:
    """The part of a `halve.json` that can be compared with the files.

    Attributes:
        shards: File name -> SHA-256.
        files: The same for all other files.
        matrices: Tensor name -> recorded properties.
        heads: The same of embedding and head, where they were quantized.
        rule_findings: Matrices whose recorded pattern is not that of the recorded rule.
    """

    shards: dict[str, str]
    files: dict[str, str]
    matrices: dict[str, _Expected]
    heads: dict[str, _Expected]
    rule_findings: tuple[Finding, ...]

    @classmethod
    def of(cls, record: PruneRecord | PackRecord) -> "_Record":
        if any(Path(name).name != name for name in record.shards):
            raise ValueError("a path in the place of a file name")
        paths = [PurePosixPath(name) for name in record.files]
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ValueError("a path out of the folder")
        return cls(
            dict(record.shards),
            dict(record.files),
            {matrix.tensor: _Expected.of(matrix) for matrix in record.all_matrices},
            {matrix.tensor: _Expected.of(matrix) for matrix in record.heads},
            tuple(rule_mismatches(record)) if isinstance(record, PruneRecord) else (),
        )


def verify_output(out: str | Path, trust_remote_code: bool = False) -> Verification:
    """Compare an output with its record; see `halve.verify` for the contract."""
    folder = resolve_model(out)
    record = _read(folder)
    digests = record.shards | record.files
    damaged = [
        Finding(name, problem)
        for name, digest in digests.items()
        if (problem := _file_damage(folder / name, digest)) is not None
    ]
    findings = damaged or list(_mismatches(folder, record, trust_remote_code))
    return Verification(
        folder=str(folder),
        files=len(digests),
        bytes=sum(_size(folder / name) for name in digests),
        matrices=0 if damaged else len(record.matrices),
        findings=tuple(findings),
    )


def _read(folder: Path) -> _Record:
    path = folder / RECORD
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {RECORD} in {folder}, which would list what was written.",
            "Pass a folder that Halve has written.",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", _REMEDY) from error
    # Before the checksum: a record of another format may have none, or another.
    with name_record(folder):
        return _parse(path, data)


def _parse(path: Path, data: bytes) -> _Record:
    """Return a record, checked for its format, its checksum, and its contents."""
    try:
        parse_fields(data.decode())
        _check_checksum(path, data)
        return _Record.of(parse_record(data.decode()))
    except _PARSE_ERRORS as error:
        _check_checksum(path, data)
        raise CheckpointError(f"{path} cannot be read ({error!r}).", _REMEDY) from error
    except (QuantizationError, PatternError) as error:
        raise CheckpointError(f"{path}: {error.problem}", _REMEDY) from error


def _check_checksum(path: Path, data: bytes) -> None:
    if not has_valid_checksum(data):
        raise CheckpointError(
            f"{path} is damaged: it does not match its own checksum.", _REMEDY
        )


def _file_damage(path: Path, digest: str) -> str | None:
    """Return what is wrong with the bytes of a file; None where nothing is."""
    if not path.is_file():
        return "it is missing"
    try:
        actual = sha256(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if actual == digest else "its SHA-256 is not the recorded one"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _mismatches(
    folder: Path, record: _Record, trust_remote_code: bool
) -> Iterator[Finding]:
    """Yield the differences between the tensors of a folder and its record."""
    checkpoint = Checkpoint.open(folder)
    loaded = {*checkpoint.shards, *find_side_files(folder)}
    if unrecorded := sorted(loaded - record.shards.keys() - record.files.keys()):
        for name in unrecorded:
            yield Finding(name, "it would be loaded, but the record does not list it")
        return
    matrices = matrices_of(folder, checkpoint, trust_remote_code)
    for name in sorted(matrices.keys() ^ record.matrices.keys()):
        yield Finding(name, "it is in the model or in the record, but not in both")
    recorded = [matrices[name] for name in matrices if name in record.matrices]
    for tensor, every in group_by_tensor(recorded).items():
        stored = checkpoint.read([tensor])[tensor]
        for planned in every:
            weight = planned.matrix.as_rows(planned.place.view(stored))
            expected = record.matrices[planned.name]
            if (problem := expected.mismatch(planned.name, weight)) is not None:
                yield Finding(planned.name, problem)
    yield from _head_mismatches(checkpoint, record)
    yield from record.rule_findings


def _head_mismatches(checkpoint: Checkpoint, record: _Record) -> Iterator[Finding]:
    for name, expected in record.heads.items():
        if name not in checkpoint.tensors:
            yield Finding(name, "it is in the record, but not in the model")
        elif problem := expected.mismatch(name, checkpoint.read([name])[name]):
            yield Finding(name, problem)
