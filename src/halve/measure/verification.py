"""Compare an output with its record: the bytes of its files, and the matrices in them.

The checksums detect every change since `halve.json` was written; the recorded shapes,
sparsities, patterns and grids, counted again in the tensors, detect what was written
wrong. Neither authenticates the output: whoever can change a file can write a new
record for it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halve.checkpoint import RECORD, Checkpoint, find_side_files, resolve_model
from halve.errors import CheckpointError, PatternError, QuantizationError
from halve.grids import QuantScheme, grid_shortfall
from halve.layout import PlannedMatrix, group_by_tensor
from halve.measure.inspection import matrices_of
from halve.measure.rule_check import rule_mismatches
from halve.patterns import NM, parse_pattern
from halve.records import (
    Finding,
    MatrixRecord,
    MatrixStorage,
    OutputRecord,
    PruneRecord,
    Verification,
)
from halve.records.stored import (
    PARSE_ERRORS,
    REMEDY,
    file_damage,
    read_output_record,
)


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
        experts: Number of experts that each module of experts has kept; None where all
            were.
        rule_findings: Matrices whose recorded pattern is not that of the recorded rule.
    """

    shards: dict[str, str]
    files: dict[str, str]
    matrices: dict[str, _Expected]
    heads: dict[str, _Expected]
    experts: int | None
    rule_findings: tuple[Finding, ...]

    @classmethod
    def of(cls, record: OutputRecord) -> "_Record":
        is_pruned = isinstance(record, PruneRecord)
        return cls(
            dict(record.shards),
            dict(record.files),
            {matrix.tensor: _Expected.of(matrix) for matrix in record.all_matrices},
            {matrix.tensor: _Expected.of(matrix) for matrix in record.heads},
            record.experts.kept if is_pruned and record.experts else None,
            tuple(rule_mismatches(record)) if is_pruned else (),
        )


def verify_output(out: str | Path, trust_remote_code: bool = False) -> Verification:
    """Compare an output with its record; see `halve.verify` for the contract."""
    folder = resolve_model(out)
    record = _read(folder)
    digests = record.shards | record.files
    damaged = [
        Finding(name, problem)
        for name, digest in digests.items()
        if (problem := file_damage(folder / name, digest)) is not None
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
    path, record = folder / RECORD, read_output_record(folder)
    try:
        return _Record.of(record)
    except PARSE_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}).", REMEDY) from error
    except (QuantizationError, PatternError) as error:
        raise CheckpointError(f"{path}: {error.problem}", REMEDY) from error


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
    if record.experts is not None:
        yield from _expert_mismatches(matrices.values(), record.experts)


def _expert_mismatches(
    matrices: Iterable[PlannedMatrix], kept: int
) -> Iterator[Finding]:
    """Yield matrices of which there is another number of experts than recorded."""
    counts = Counter(m.experts_name for m in matrices if m.experts_name is not None)
    for name, count in counts.items():
        if count != kept:
            yield Finding(name, f"there are {count} experts, not {kept}")
    if not counts:
        yield Finding(RECORD, f"it lists {kept} experts, but the model has none")


def _head_mismatches(checkpoint: Checkpoint, record: _Record) -> Iterator[Finding]:
    for name, expected in record.heads.items():
        if name not in checkpoint.tensors:
            yield Finding(name, "it is in the record, but not in the model")
        elif problem := expected.mismatch(name, checkpoint.read([name])[name]):
            yield Finding(name, problem)
