"""What is done to every block of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from halve.calibration_stats import Statistic
from halve.pruning.select.selection import Candidate, OwnCandidates, combined_needs
from halve.pruning.tune.block_reconstruction import TuneOptions
from halve.solvers import Needs
from halve.solvers.hessian import all_needs


@dataclass(frozen=True)
class BlockOptions:
    """What is done to every block.

    Attributes:
        candidates: Ways to prune a matrix; of several, the one with the lowest error on
            held-out inputs is selected.
        damping: Fraction of the mean diagonal that is added to Gram matrices.
        ridge: Factor of what is added to them for each column (`Hessian.ridges`).
        corrects: Whether the groups of a block are pruned in order, for error-corrected
            targets; else all at once, for the outputs of the dense matrices on the same
            inputs.
        refining: How the block is tuned after pruning; None to leave it.
        budget: Bytes of the dense model's inputs that may be cached in memory.
        folder: Where memory-mapped files are created past that; None for the system's
            temporary folder.
        report: Called with the name of each phase.
        own: Ways to prune matrices, in place of `candidates`, by name.
        deferred: Whether the widest inputs are spilled and summed later (`MemoryPlan`).
        skipped: Tensors of matrices that are left as they are.
        importance: Name of a matrix -> importance of its rows (`importance`), [rows];
            the rows of others count alike.
    """

    candidates: tuple[Candidate, ...]
    damping: float
    ridge: float
    corrects: bool
    refining: TuneOptions | None
    budget: int
    folder: Path | None
    report: Callable[[str], None]
    own: OwnCandidates = field(default_factory=dict)
    deferred: bool = False
    skipped: frozenset[str] = frozenset()
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    def candidates_of(self, tensor: str) -> tuple[Candidate, ...]:
        """Return the ways to prune a matrix."""
        return self.own.get(tensor, self.candidates)

    @property
    def needs(self) -> Needs:
        """What solvers and corrections read of the inputs."""
        own = (candidate for ways in self.own.values() for candidate in ways)
        needs = combined_needs((*self.candidates, *own))
        return all_needs(needs, self.corrects, self.ridge)

    @property
    def statistic(self) -> type[Statistic]:
        """The calibration statistic that suffices for that."""
        return self.needs.statistic
