"""What is kept of a run, as plain values that go to JSON and back. No torch here."""

import datetime
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from math import isfinite
from typing import Any

from halve.records.codec import from_dict, sealed
from halve.untrusted import parse_json


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, for its record."""
    return {name: metadata.version(name) for name in ("halve", "torch", "transformers")}


def now() -> str:
    """Return the time for a record: ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _unsealed(text: str) -> dict[str, Any]:
    fields = dict(parse_json(text))
    fields.pop("seal", None)
    return fields


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        block: Index of the block, or file, at hand.
        blocks: How many there are.
        phase: What is being done to it.
        seconds_left: For the whole job; None where that is not known yet.
    """

    block: int
    blocks: int
    phase: str
    seconds_left: float | None = None


@dataclass(frozen=True)
class MatrixRecord:
    """What became of one matrix.

    Attributes:
        tensor: Its name in the checkpoint.
        rows: Outputs.
        columns: Inputs.
        sparsity: Share of zeros, counted in the file that was written.
        error: ||X (W - Z)^T||^2 / ||X W^T||^2 on the calibration inputs, W being the
            corrected target where targets are corrected; None where the solver does
            not know them.
        damping: Share of the mean diagonal added to the Gram matrix, if any.
        solver: Which one's solution was taken.
        held_out: ||X_dense W^T - X Z^T||^2 / ||X_dense W^T||^2 on windows that no
            solver was given; None where none were kept apart.
        runner_up: The same of the next best solution; None where there was no other.
        grid: Bits, group size, symmetry and precision of the scales of the grid on
            which all its values lie; None where they were not rounded.
        bits: A weight, when packed with that grid: mask, codes and scales.
        pattern: What it obeys, as `patterns` writes it.
    """

    tensor: str
    rows: int
    columns: int
    sparsity: float
    error: float | None = None
    damping: float | None = None
    solver: str = ""
    held_out: float | None = None
    runner_up: float | None = None
    grid: dict[str, Any] | None = None
    bits: float | None = None
    pattern: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"a sparsity of {self.sparsity}")


@dataclass(frozen=True)
class TrialRecord:
    """What became of an allocation that was tried.

    Attributes:
        strength: How far a block's sparsity may move from the model's; 0 is uniform.
        sparsities: Of the blocks.
        divergence: Mean KL(dense || pruned) of the predicted tokens in windows kept
            apart, in nats.
    """

    strength: float
    sparsities: tuple[float, ...]
    divergence: float


@dataclass(frozen=True)
class AllocationRecord:
    """How the sparsity was shared out over the blocks, and why.

    Attributes:
        strength: Of the trial that lost least; 0 is uniform.
        sparsities: Of the blocks, as that trial had them.
        errors: ||Y - Y'|| / ||Y|| of each block's outputs before and after pruning to
            the model's sparsity, on the same inputs from windows kept apart.
        trials: All that were tried.
    """

    strength: float
    sparsities: tuple[float, ...]
    errors: tuple[float, ...]
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True)
class BlockRecord:
    """What became of one block.

    Attributes:
        name: Such as `model.layers.3`.
        matrices: In the order of the modules.
        error: ||Y - Y'|| / ||Y|| for the block's outputs before and after pruning on
            the same inputs (the first calibration batch); None without calibration.
        seconds: Wall time.
        refined: ||Y_dense - Y'||^2 / ||Y_dense||^2 of the block's outputs on windows
            kept apart, before and after refining; None where it was not refined.
    """

    name: str
    matrices: tuple[MatrixRecord, ...]
    error: float | None
    seconds: float
    refined: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"the block {self.name} has no weights")

    @property
    def weights(self) -> int:
        """Weights in all matrices."""
        return sum(m.rows * m.columns for m in self.matrices)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all matrices."""
        return (
            sum(m.sparsity * m.rows * m.columns for m in self.matrices) / self.weights
        )

    @property
    def zeros(self) -> int:
        """Weights that are zero."""
        return sum(round(m.sparsity * m.rows * m.columns) for m in self.matrices)


@dataclass(frozen=True)
class PruneRecord:
    """A whole run: the contents of `halve.json`.

    Attributes:
        format: Version of this layout.
        versions: Of Halve, torch and transformers.
        identity: The plan: model, settings, digests of config and text. Two runs with
            the same identity give the same bytes on one machine.
        blocks: One for each decoder block.
        shards: File name -> SHA-256.
        kind: `prune`.
        left_dense: Tensors in the blocks of two dimensions or more that no rule prunes.
        seconds: Wall time of the run that finished it.
        finished: ISO 8601, UTC.
        allocation: How the sparsity was shared out; None where all matrices have it.
        files: Every other file but this one -> SHA-256.
    """

    versions: dict[str, str]
    identity: dict[str, Any]
    blocks: tuple[BlockRecord, ...]
    shards: dict[str, str]
    left_dense: tuple[str, ...]
    seconds: float
    finished: str
    kind: str = "prune"
    format: int = 1
    allocation: AllocationRecord | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all prunable matrices."""
        return self._mean(lambda matrix: matrix.sparsity)

    @property
    def bits(self) -> float | None:
        """Bits a prunable weight, when packed; None where they were not rounded."""
        if any(m.bits is None for block in self.blocks for m in block.matrices):
            return None
        return self._mean(lambda matrix: matrix.bits or 0.0)

    @property
    def all_matrices(self) -> tuple[MatrixRecord, ...]:
        """Matrices of all blocks."""
        return tuple(m for block in self.blocks for m in block.matrices)

    def _mean(self, of: Callable[[MatrixRecord], float]) -> float:
        """Return the mean over all weights of what each matrix has."""
        matrices = self.all_matrices
        total = sum(of(m) * m.rows * m.columns for m in matrices)
        return total / sum(block.weights for block in self.blocks)

    def to_json(self) -> str:
        """Return the text of `halve.json`."""
        return sealed(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PruneRecord":
        """Read what `to_json` wrote: `from_json(r.to_json()) == r`."""
        record = from_dict(cls, _unsealed(text))
        if not record.blocks or not isfinite(record.seconds):
            raise ValueError("there are no blocks, or no end")
        return record


@dataclass(frozen=True)
class MatrixStorage:
    """How one matrix is stored.

    Attributes:
        tensor: Its name in the checkpoint.
        rows: Outputs.
        columns: Inputs.
        sparsity: Share of zeros.
        minus_zeros: Zeros with a sign, which are kept like any other weight.
        dense_bytes: When dense.
        stored_bytes: In the file.
        packed: Whether it is; a matrix that would not get smaller stays dense.
        pattern: The tightest that it obeys.
        grid: On which all its values lie, where the input's record names one.
    """

    tensor: str
    rows: int
    columns: int
    sparsity: float
    minus_zeros: int
    dense_bytes: int
    stored_bytes: int
    packed: bool
    pattern: str = ""
    grid: dict[str, Any] | None = None


@dataclass(frozen=True)
class PackRecord:
    """A packed, or unpacked, model: the contents of its `halve.json`.

    Attributes:
        kind: `pack` or `unpack`.
        versions: Of Halve, torch and transformers.
        identity: The verb, the version of the format, and digests of the input.
        matrices: Every prunable matrix.
        shards: File name -> SHA-256.
        source: The input's `halve.json`, if it had one.
        seconds: Wall time of the run that finished it.
        finished: ISO 8601, UTC.
        format: Version of this layout.
        files: Every other file but this one -> SHA-256.
    """

    kind: str
    versions: dict[str, str]
    identity: dict[str, Any]
    matrices: tuple[MatrixStorage, ...]
    shards: dict[str, str]
    source: dict[str, Any] | None
    seconds: float
    finished: str
    format: int = 1
    files: dict[str, str] = field(default_factory=dict)

    @property
    def all_matrices(self) -> tuple[MatrixStorage, ...]:
        """Every prunable matrix, by the name that a PruneRecord has for them."""
        return self.matrices

    @property
    def dense_bytes(self) -> int:
        """Bytes of all prunable matrices when dense."""
        return sum(matrix.dense_bytes for matrix in self.matrices)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all prunable matrices in the files."""
        return sum(matrix.stored_bytes for matrix in self.matrices)

    def to_json(self) -> str:
        """Return the text of `halve.json`."""
        return sealed(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PackRecord":
        """Read what `to_json` wrote: `from_json(r.to_json()) == r`."""
        record = from_dict(cls, _unsealed(text))
        if not record.dense_bytes or not isfinite(record.seconds):
            raise ValueError("there are no weights, or no end")
        return record


def parse_record(text: str) -> PruneRecord | PackRecord:
    """Read a `halve.json` of either kind.

    Raises:
        ValueError, TypeError, LookupError: It is neither.
    """
    kind = dict(json.loads(text))["kind"]
    return (PruneRecord if kind == "prune" else PackRecord).from_json(text)


def recorded_grids(source: dict[str, Any] | None) -> dict[str, Any]:
    """Return tensor -> grid of what a source's `halve.json` says was rounded."""
    try:
        record = parse_record(json.dumps(source))
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
    return {matrix.tensor: matrix.grid for matrix in record.all_matrices if matrix.grid}


@dataclass(frozen=True)
class PerplexityRecord:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean over segments of the mean loss of a segment.
        standard_error: Of the perplexity, from the spread of the segments' losses.
        tokens: Predicted tokens.
        seq_len: Tokens in a segment, its first, unpredicted, included.
        segments: How many.
        data: Name of the text.
        seconds: Wall time.
    """

    perplexity: float
    standard_error: float
    tokens: int
    seq_len: int
    segments: int
    data: str
    seconds: float


@dataclass(frozen=True)
class ComparisonRecord:
    """A model against a reference on the same text, token by token.

    Attributes:
        model: Perplexity of the model.
        reference: Perplexity of the reference.
        kl_mean: Mean Kullback-Leibler divergence of the model's prediction from the
            reference's, KL(reference || model), in nats.
        kl_median: Its median over tokens.
        kl_99: Its 99th percentile.
        agreement: Share of tokens for which both name the same likeliest next token.
    """

    model: PerplexityRecord
    reference: PerplexityRecord
    kl_mean: float
    kl_median: float
    kl_99: float
    agreement: float


@dataclass(frozen=True)
class MatrixInspection:
    """What lies in a file for one prunable matrix.

    Attributes:
        tensor: Its name in the checkpoint.
        rows: Outputs.
        columns: Inputs.
        dtype: As stored.
        sparsity: Share of zeros.
        pattern: `dense`, `unstructured`, or the tightest n:m it obeys.
        bytes: As stored.
        packed: Whether it is stored packed.
        packed_bytes: What it takes, or would take, packed; None for a dtype that
            cannot be.
    """

    tensor: str
    rows: int
    columns: int
    dtype: str
    sparsity: float
    pattern: str
    bytes: int
    packed: bool
    packed_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What is in a model, counted in its files.

    Attributes:
        model: Folder.
        matrices: Every prunable matrix.
        parameters: Numbers in all tensors.
        zeros: Zeros in all tensors.
        bytes: Bytes of all tensors.
    """

    model: str
    matrices: tuple[MatrixInspection, ...]
    parameters: int
    zeros: int
    bytes: int

    @property
    def sparsity(self) -> float:
        """Share of zeros over all prunable matrices."""
        zeros = sum(m.sparsity * m.rows * m.columns for m in self.matrices)
        return zeros / sum(m.rows * m.columns for m in self.matrices)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a file, or with a matrix in it.

    Attributes:
        name: Of the file, or of the matrix's tensor.
        problem: What was found.
    """

    name: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """What a folder holds against what its record says.

    Attributes:
        folder: That was looked at.
        files: Whose digests were compared.
        bytes: In them.
        matrices: Whose promises were checked: all, or none where a file is not what was
            written.
        findings: What is wrong; empty where nothing is.
    """

    folder: str
    files: int
    bytes: int
    matrices: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether everything is as it was written and promised."""
        return not self.findings


@dataclass(frozen=True)
class Footprint:
    """Peaks of a process's resident memory, in bytes.

    Attributes:
        interpreter: Python with torch and transformers, before anything is loaded.
        loaded: After loading a model.
        run: After generating with it.
    """

    interpreter: int
    loaded: int
    run: int


@dataclass(frozen=True)
class SpeedRecord:
    """How fast one backend did one test.

    Attributes:
        backend: What multiplied.
        test: `pp512`, `tg128`, `tg128 x4` ...
        batch: Sequences at once.
        tokens: Processed or generated in each round.
        seconds: Of each round.
        weight_bytes: Bytes of weights that one decode step reads.
    """

    backend: str
    test: str
    batch: int
    tokens: int
    seconds: tuple[float, ...]
    weight_bytes: int

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each round."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def median(self) -> float:
        """Median of the rounds' tokens a second."""
        return statistics.median(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of the rounds' tokens a second."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0

    @property
    def mean(self) -> float:
        """Mean of the rounds' tokens a second."""
        return statistics.fmean(self.rates)

    @property
    def bandwidth(self) -> float:
        """Bytes of weights read in a second, for decoding."""
        return self.weight_bytes * self.median / self.batch


@dataclass(frozen=True)
class BenchRecord:
    """A model timed on one machine.

    Attributes:
        model: Its name.
        parameters: Numbers in all tensors.
        sizes: Backend -> bytes of all tensors in the files it runs from.
        cpu: As the machine names it.
        threads: Of torch, and of the kernels.
        kernel: The kernel in use, `torch` where there is none.
        bandwidth: Bytes a second that all threads read from memory, at best.
        results: Each backend in each test.
        footprints: `dense` and `packed` -> memory of a process that runs it.
    """

    model: str
    parameters: int
    sizes: dict[str, int]
    cpu: str
    threads: int
    kernel: str
    bandwidth: float
    results: tuple[SpeedRecord, ...]
    footprints: dict[str, Footprint]
