"""The record of a pruning run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from halve.records.halve_json import HalveJson
from halve.records.origin import MachineRecord, ModelRecord
from halve.records.version import RECORD_FORMAT


@dataclass(frozen=True)
class MatrixRecord:
    """The result for one matrix.

    W is the dense matrix, Z the pruned one, X the calibration inputs of the partly
    pruned model (one token per row), X_dense those of the dense model.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        rows: Number of output features.
        columns: Number of input features.
        sparsity: Fraction of zeros, counted in the written file.
        error: Relative squared output error on the calibration inputs,
            ||X (W - Z)^T||^2 / ||X W^T||^2. W is the corrected target where targets are
            corrected. None where the solver does not compute it.
        damping: Added to the diagonal of the Gram matrix, as a fraction of the mean
            diagonal; None where the solver adds none.
        solver: Name of the solver whose solution was selected.
        held_out: Mean over held-out tokens t of ||Y_t - Y'_t||^2 / ||Y_t||^2, where
            Y = X_dense W^T and Y' = X Z^T, squares of rows multiplied by their
            importance; None where nothing was held out.
        runner_up: `held_out` of the second-best candidate; None where there was one
            candidate only.
        grid: Bits, group size, symmetry and scale precision of the quantization grid
            on which all values lie; None where the matrix was not quantized.
        bits: Bits per weight when packed with that grid, for mask, codes and scales
            together; None where the matrix was not quantized.
        pattern: The sparsity pattern, as `halve.patterns` writes it.
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
    """One allocation that was tried on the whole model.

    Attributes:
        strength: How far the sparsity of a block may deviate from the model's; 0 is
            the uniform allocation.
        sparsities: Sparsity of each block.
        divergence: Mean KL(dense || pruned) of the predicted tokens on held-out
            samples, in nats.
    """

    strength: float
    sparsities: tuple[float, ...]
    divergence: float


@dataclass(frozen=True)
class AllocationRecord:
    """How the sparsity was distributed over the blocks, and on which evidence.

    Attributes:
        strength: `strength` of the trial with the lowest divergence; 0 is uniform.
        sparsities: Sparsity of each block in that trial.
        errors: For each block, ||Y - Y'|| / ||Y||, where Y and Y' are its outputs
            before and after pruning it to the model's sparsity, on the same held-out
            inputs.
        trials: All trials.
    """

    strength: float
    sparsities: tuple[float, ...]
    errors: tuple[float, ...]
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True)
class ZerosRecord:
    """How the sparsity was distributed over the matrices by importance.

    Attributes:
        zeros: Name of a matrix -> number of weights to prune in it.
    """

    zeros: dict[str, int]


@dataclass(frozen=True)
class PairRecord:
    """What some matrices were pruned and quantized to.

    Attributes:
        sparsity: Fraction of zeros.
        grid: The fields of the grid.
    """

    sparsity: float
    grid: dict[str, Any]


@dataclass(frozen=True)
class MixTrialRecord:
    """One mix that was tried on the whole model.

    Attributes:
        name: What the matrices got.
        bits: Bits per weight of all matrices together, when packed.
        divergence: As in `TrialRecord`.
    """

    name: str
    bits: float
    divergence: float


@dataclass(frozen=True)
class MixRecord:
    """How a number of bits a weight was met, and on which evidence.

    Attributes:
        name: `name` of the trial with the lowest divergence.
        bits: `bits` of that trial.
        pairs: What matrices get.
        matrices: For each matrix, in the order of the blocks, the index of its pair.
        trials: All trials.
    """

    name: str
    bits: float
    pairs: tuple[PairRecord, ...]
    matrices: tuple[int, ...]
    trials: tuple[MixTrialRecord, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= index < len(self.pairs) for index in self.matrices):
            raise ValueError("a matrix has no pair")


@dataclass(frozen=True)
class KeptExpertsRecord:
    """Which experts a module of experts has kept, and on which evidence.

    Attributes:
        module: Path of the module, such as `model.layers.3.mlp.experts`.
        kept: Their numbers before, ascending; they are numbered from 0 now.
        saliency: Name of the score whose highest experts were kept.
        errors: Name of each score that was tried -> mean over held-out tokens t of
            ||Y_t - Y'_t||^2 / ||Y_t||^2, where Y and Y' are the block's outputs with
            all experts and with those that it keeps, on the same inputs.
    """

    module: str
    kept: tuple[int, ...]
    saliency: str
    errors: dict[str, float]

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)) or min(self.kept, default=-1) < 0:
            raise ValueError(f"the experts {self.kept} of {self.module}")


@dataclass(frozen=True)
class ExpertsRecord:
    """The experts that were kept; the others were dropped whole.

    Attributes:
        total: Number of experts of each module of experts before.
        kept: Number that each keeps.
        modules: One record for each module of experts.
    """

    total: int
    kept: int
    modules: tuple[KeptExpertsRecord, ...]

    def __post_init__(self) -> None:
        wrong = [
            module.module
            for module in self.modules
            if len(module.kept) != self.kept or max(module.kept) >= self.total
        ]
        if wrong:
            raise ValueError(f"not {self.kept} of {self.total} experts: {wrong[0]}")

    @property
    def by_module(self) -> dict[str, tuple[int, ...]]:
        """Path of a module of experts -> the experts that it has kept."""
        return {module.module: module.kept for module in self.modules}


@dataclass(frozen=True)
class BlockRecord:
    """The result for one decoder block.

    Attributes:
        name: Module path, such as `model.layers.3`.
        matrices: The pruned matrices, in the order of the modules.
        error: ||Y - Y'|| / ||Y||, where Y and Y' are the block's outputs before and
            after pruning, on the same inputs (the first calibration batch); None
            without calibration.
        seconds: Wall time.
        refined: ||Y_dense - Y'||^2 / ||Y_dense||^2 of the block's outputs, each token
            for itself and then their mean, on held-out samples, before and after
            refining; None where the block was not refined.
        token_error: As `error`, but the root mean square over tokens of each token's
            error relative to its own size: a token that is far larger than the rest
            counts like any other.
        expert_tokens: Path of each module of experts within the block -> number of
            calibration tokens that were sent to each expert; empty where there are no
            experts, or no text was run.
    """

    name: str
    matrices: tuple[MatrixRecord, ...]
    error: float | None
    seconds: float
    refined: tuple[float, float] | None = None
    token_error: float | None = None
    expert_tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(f"the block {self.name} has no weights")

    @property
    def weights(self) -> int:
        """Number of weights in all matrices."""
        return sum(m.rows * m.columns for m in self.matrices)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all matrices."""
        return (
            sum(m.sparsity * m.rows * m.columns for m in self.matrices) / self.weights
        )

    @property
    def zeros(self) -> int:
        """Number of weights that are zero."""
        return sum(round(m.sparsity * m.rows * m.columns) for m in self.matrices)


@dataclass(frozen=True)
class PruneRecord(HalveJson):
    """The record of a pruning run: the contents of `halve.json`.

    Attributes:
        format: Version of the record's layout; see `RECORD_FORMAT`.
        versions: Versions of Halve, torch and transformers.
        identity: What determines the output: options, and digests of the model, its
            config and the calibration text. Two runs with the same identity write the
            same bytes on one machine.
        blocks: One record for each decoder block.
        shards: File name -> SHA-256.
        kind: `prune`.
        left_dense: Names of the tensors of two or more dimensions inside the blocks
            that no rule prunes.
        seconds: Wall time of the run that completed the output.
        finished: When it did, ISO 8601, UTC.
        allocation: How the sparsity was distributed; None where every matrix has the
            same.
        mix: What each matrix was pruned and quantized to, where a number of bits a
            weight was requested; else None.
        experts: Which experts were kept; None where all were.
        files: Every other file except `halve.json` -> SHA-256.
        heads: Embedding and output head, where they were quantized.
        model: The dense model; None if that is not known.
        machine: Where the run was completed; None if that is not known.
        bytes_peak: Peak of resident memory of the process that completed it; 0 if that
            had held more before the run.
        bytes_foreseen: The peak that was predicted before it.
    """

    versions: dict[str, str]
    identity: dict[str, Any]
    blocks: tuple[BlockRecord, ...]
    shards: dict[str, str]
    left_dense: tuple[str, ...]
    seconds: float
    finished: str
    kind: str = "prune"
    format: int = RECORD_FORMAT
    allocation: AllocationRecord | None = None
    mix: MixRecord | None = None
    experts: ExpertsRecord | None = None
    files: dict[str, str] = field(default_factory=dict)
    heads: tuple[MatrixRecord, ...] = ()
    model: ModelRecord | None = None
    machine: MachineRecord | None = None
    bytes_peak: int = 0
    bytes_foreseen: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all prunable matrices."""
        return self._mean(lambda matrix: matrix.sparsity)

    @property
    def sparsity_range(self) -> tuple[float, float]:
        """The lowest and the highest sparsity of a matrix."""
        sparsities = [matrix.sparsity for matrix in self.all_matrices]
        return min(sparsities), max(sparsities)

    @property
    def bits(self) -> float | None:
        """Bits per prunable weight when packed; None where they are not quantized."""
        if any(m.bits is None for block in self.blocks for m in block.matrices):
            return None
        return self._mean(lambda matrix: matrix.bits or 0.0)

    @property
    def all_matrices(self) -> tuple[MatrixRecord, ...]:
        """The matrices of all blocks."""
        return tuple(m for block in self.blocks for m in block.matrices)

    def _mean(self, value: Callable[[MatrixRecord], float]) -> float:
        """Return the mean of a value per matrix, weighted by the number of weights."""
        matrices = self.all_matrices
        total = sum(value(m) * m.rows * m.columns for m in matrices)
        return total / sum(block.weights for block in self.blocks)

    def __repr__(self) -> str:
        """Return a line: the fields of all matrices are thousands of characters."""
        return (
            f"PruneRecord({100 * self.sparsity:.2f}% zeros in "
            f"{len(self.all_matrices)} matrices of {len(self.blocks)} blocks, "
            f"{self.seconds:.1f} s)"
        )

    def _check(self) -> None:
        if not self.blocks or not isfinite(self.seconds):
            raise ValueError("there are no blocks, or the time is not finite")
