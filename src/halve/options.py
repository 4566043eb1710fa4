"""What the user chose, and what makes no sense of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halve.errors import HalveError
from halve.grids import QuantScheme, parse_scheme, schemes_for_bits
from halve.patterns import NM, Pattern, Unstructured, parse_pattern
from halve.records import Progress
from halve.solvers import SOLVERS

# Solvers whose targets are corrected unless the user says otherwise: where it measures
# better. The others are as they were published.
_SEQUENTIAL = ("auto", "admm")
# One window in so many is kept apart where something is chosen.
_HELD_OUT = 16
_ALLOCATIONS = ("uniform", "error")


@dataclass(frozen=True)
class PruneOptions:
    """What the user chose, as far as it changes the result.

    Attributes:
        sparsity: `50%`, `0.5` or `2:4`.
        solver: A name of `halve.solvers.SOLVERS`.
        calibration: Name of a corpus, a file, or `self`.
        samples: Calibration windows.
        seq_len: Tokens in each; None for the model's own length, 2048 at most.
        seed: Of the windows.
        damping: Share of the mean diagonal added to Gram matrices.
        block_size: Columns that SparseGPT handles at once.
        device: `cpu`, `cuda` or `auto`.
        packed: Whether matrices are stored packed.
        refit: Whether the kept weights are tuned once the mask is chosen.
        sequential: Whether the matrices of a block are pruned in the order in which
            data meets them, for error-corrected targets; None leaves it to the solver.
        refine: Whether whole blocks are tuned after they are pruned.
        epochs: Passes over the windows for that.
        quantize: `int8`, `int4`, `int3` or `int2` to round the kept weights to a grid
            of so many bits; None to leave them as they are. The sparsity may be 0 then.
        group_size: Weights that share a scale.
        symmetric: Whether grids have no zero points.
        target_bits: Bits a weight, mask and scales included: the sparsity and the grid
            are chosen for each matrix among the pairs that take so many.
        allocation: How an unstructured sparsity is shared out over the blocks:
            `uniform`, or by their `error`.
    """

    sparsity: str | float = "50%"
    solver: str = "auto"
    calibration: str = "c4"
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    damping: float = 0.01
    block_size: int = 128
    device: str = "auto"
    packed: bool = False
    refit: bool = False
    sequential: bool | None = None
    refine: bool = False
    epochs: int = 3
    quantize: str | None = None
    group_size: int = 128
    symmetric: bool = True
    target_bits: float | None = None
    allocation: str = "uniform"

    @property
    def pairs(self) -> list[tuple[Pattern, QuantScheme | None]]:
        """Patterns and grids to choose from; one, unless bits are what is given."""
        if self.target_bits is not None:
            found = schemes_for_bits(self.target_bits, self.group_size, self.symmetric)
            return [(Unstructured(sparsity), grid) for sparsity, grid in found]
        if self.quantize is None:
            return [(parse_pattern(self.sparsity), None)]
        grid = parse_scheme(self.quantize, self.group_size, self.symmetric)
        return [(parse_pattern(self.sparsity, allow_dense=True), grid)]

    @property
    def corrects(self) -> bool:
        """Whether matrices are pruned in order, for error-corrected targets."""
        if self.sequential is None:
            return self.solver in _SEQUENTIAL
        return self.sequential

    @property
    def has_dense(self) -> bool:
        """Whether the dense model runs beside, to be compared with."""
        return self.corrects or self.refine

    @property
    def activation_parts(self) -> int:
        """Into how many parts the memory for activations is cut.

        Two streams, where there are two, and what the dense one leaves behind.
        """
        return 3 if self.has_dense else 1

    @property
    def held_out(self) -> int:
        """Windows kept apart, to choose by."""
        chooses = self.solver == "auto" or self.refine or len(self.pairs) > 1
        return max(self.samples // _HELD_OUT, 1) if chooses else 0

    @property
    def allocation_held_out(self) -> int:
        """Windows kept apart while allocations are tried, to judge those by."""
        return max(self.samples // _HELD_OUT, 1) if self.allocation == "error" else 0

    def check(self) -> None:
        """Raise HalveError on the first setting that makes no sense."""
        _ = self.pairs  # raises where they make no sense
        if self.target_bits is not None and (
            self.quantize or self.sparsity != PruneOptions.sparsity
        ):
            raise HalveError(
                "A sparsity or grid was given as well as bits a weight, by which both "
                "are chosen.",
                "Pass --target-bits alone, or the other two.",
            )
        if self.solver not in ("auto", *SOLVERS):
            raise HalveError(
                f"There is no solver {self.solver!r}.",
                f"Choose one of auto, {', '.join(SOLVERS)}.",
            )
        for name in ("samples", "block_size", "seq_len", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HalveError(
                    f"{name} is {value}, which is not positive.", "Pass 1 or more."
                )
        self._check_grids()
        self._check_allocation()
        if max(self.held_out, self.allocation_held_out) >= self.samples:
            raise HalveError(
                f"One of {self.samples} samples was to be kept apart to choose by, and "
                "none would be left to calibrate on.",
                "Pass --samples 2 or more.",
            )
        if not 0 <= self.damping <= 1:
            raise HalveError(
                f"The damping is {self.damping}; a share of the mean diagonal from 0 "
                "to 1 was expected.",
                "Pass --damping 0.01.",
            )

    def _check_grids(self) -> None:
        chosen = (self.group_size, self.symmetric)
        if self.pairs[0][1] is None and chosen != (
            PruneOptions.group_size,
            PruneOptions.symmetric,
        ):
            raise HalveError(
                "A group size or zero points were asked for, but nothing is rounded.",
                "Pass --quantize int4 or --target-bits as well.",
            )

    def _check_allocation(self) -> None:
        if self.allocation not in _ALLOCATIONS:
            raise HalveError(
                f"There is no allocation {self.allocation!r}.",
                f"Choose one of {', '.join(_ALLOCATIONS)}.",
            )
        if self.allocation == "uniform":
            return
        pattern, *others = [pattern for pattern, _ in self.pairs]
        if isinstance(pattern, NM) or pattern.sparsity == 0 or others:
            what = "A number of bits a weight" if others else f"The pattern {pattern}"
            raise HalveError(
                f"{what} prunes all blocks alike, so there is nothing to share out by "
                f"{self.allocation}.",
                "Pass --allocation uniform, or an unstructured sparsity such as 50%.",
            )


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it; nothing here changes the result.

    Attributes:
        activation_memory: Bytes of hidden states that may live in a process's memory;
            None for a quarter of the machine's, shared by the processes on it.
        memory: Bytes that a process may take, by which that is chosen (`plan_memory`).
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each phase.
    """

    activation_memory: int | None = None
    memory: int | None = None
    trust_remote_code: bool = False
    progress: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True)
class EvalOptions:
    """What to judge on, and how.

    Attributes:
        data: wikitext2, ptb, c4, stdlib, a data set of the hub, or a file.
        seq_len: Tokens in a segment; None for the model's own length, 2048 at most.
        segments: At most so many; None for all.
        device: `cpu`, `cuda` or `auto`.
        activation_memory: Bytes of hidden states that may live in memory; None for a
            quarter of the machine's.
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each block: its index and how many there are.
    """

    data: str = "wikitext2"
    seq_len: int | None = None
    segments: int | None = None
    device: str = "auto"
    activation_memory: int | None = None
    trust_remote_code: bool = False
    progress: Callable[[int, int], None] = lambda block, blocks: None


@dataclass(frozen=True)
class PackOptions:
    """What is asked for.

    Attributes:
        positive_zeros: Whether minus zeros become zeros first. They arise where a
            weight was multiplied by a mask, and are kept, bit for bit, otherwise.
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each file.
    """

    positive_zeros: bool = False
    trust_remote_code: bool = False
    progress: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        name: Of the model, for the table.
        dense: Folder of the model, dense.
        packed: Folder of the same model, packed.
        prompt: Tokens of the prompt, 0 for no such test; None for 512, or what the
            model takes.
        generated: Tokens generated, 0 for no such test; None for 128, or what the model
            takes.
        batches: Sequences decoded at once.
        rounds: How often.
        trust_remote_code: Whether Python code that comes with the model may run.
    """

    name: str
    dense: Path
    packed: Path
    prompt: int | None
    generated: int | None
    batches: tuple[int, ...]
    rounds: int
    trust_remote_code: bool = False
