"""The record of recovery."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from halve.records.halve_json import HalveJson
from halve.records.pack import MatrixStorage
from halve.records.version import RECORD_FORMAT


@dataclass(frozen=True)
class StateRecord:
    """A state of the weights that was judged.

    Attributes:
        step: Number of steps taken; 0 is the input.
        divergence: KL(dense || model) on the held-out windows, in nats per token, of
            the weights rounded to their dtypes.
    """

    step: int
    divergence: float


@dataclass(frozen=True)
class RecoverRecord(HalveJson):
    """The record of a recovered model: the contents of its `halve.json`.

    Attributes:
        kind: `recover`.
        versions: Versions of Halve, torch and transformers.
        identity: What determines the output: options, and digests of both models and of
            the windows.
        against: The dense model, as the user gave it.
        steps: Number of steps.
        states: Every state that was judged, the input first.
        best_step: The step of the state that was stored; 0 if none was better than the
            input, whose weights the output then has.
        trained: Number of parameters that were trained, zeros included.
        unchanged: Matrices that keep their values because they are quantized.
        matrices: Every prunable matrix.
        shards: File name -> SHA-256.
        source: The fields of the input's `halve.json`; None where it has none.
        seconds: Wall time of the run that completed the output.
        finished: When it did, ISO 8601, UTC.
        bytes_peak: Peak of resident memory of the process that completed it; 0 if that
            had held more before the run.
        format: Version of the record's layout; see `RECORD_FORMAT`.
        files: Every other file except `halve.json` -> SHA-256.
        heads: Embedding and output head, where the input's record names their grids.
    """

    kind: str
    versions: dict[str, str]
    identity: dict[str, Any]
    against: str
    steps: int
    states: tuple[StateRecord, ...]
    best_step: int
    trained: int
    unchanged: tuple[str, ...]
    matrices: tuple[MatrixStorage, ...]
    shards: dict[str, str]
    source: dict[str, Any] | None
    seconds: float
    finished: str
    bytes_peak: int = 0
    format: int = RECORD_FORMAT
    files: dict[str, str] = field(default_factory=dict)
    heads: tuple[MatrixStorage, ...] = ()

    @property
    def all_matrices(self) -> tuple[MatrixStorage, ...]:
        """Every prunable matrix, under the name that PruneRecord uses."""
        return self.matrices

    @property
    def before(self) -> float:
        """Held-out divergence of the input."""
        return self.states[0].divergence

    @property
    def after(self) -> float:
        """Held-out divergence of the output; never greater."""
        return min(state.divergence for state in self.states)

    @property
    def dense_bytes(self) -> int:
        """Size of all prunable matrices when dense."""
        return sum(matrix.dense_bytes for matrix in self.matrices)

    def __repr__(self) -> str:
        """Return a line: the fields of all matrices are thousands of characters."""
        return (
            f"RecoverRecord(step {self.best_step} of {self.steps}, held-out divergence "
            f"{self.before:.5f} before, {self.after:.5f} after)"
        )

    def _check(self) -> None:
        if not self.states or not isfinite(self.seconds):
            raise ValueError("there are no states, or the time is not finite")
