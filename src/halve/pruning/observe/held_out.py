"""Held-out inputs of a group, on which candidates for its matrices are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halve.distributed import Ranks
from halve.numerics.matmul import linear

# Tokens of held-out inputs that are stored for each group, about; more of them hardly
# change which candidate is selected.
_MAX_TOKENS = 4096


@dataclass
class HeldOut:
    """Inputs of a group that no solver has seen.

    Attributes:
        pairs: For each held-out batch the group's inputs in the pruned model, X, and in
            the dense model, X_dense, both [tokens, columns], float32. The same tensor
            twice where the dense model does not run.
        step: Every `step`-th token is stored.
    """

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    step: int = 1

    @classmethod
    def of(cls, tokens: int) -> "HeldOut":
        """Return an empty set, for a sample of so many tokens."""
        return cls(step=max(-(-tokens // _MAX_TOKENS), 1))

    @staticmethod
    def nbytes(tokens: int, columns: int) -> int:
        """Return the bytes that pairs of inputs take, of so many held-out tokens."""
        return 2 * 4 * min(tokens, _MAX_TOKENS) * columns

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Store a sample of a batch of X and X_dense, [tokens, columns] each."""
        self.pairs.append((inputs[:: self.step].clone(), dense[:: self.step].clone()))

    def gather(self, ranks: Ranks, wanted: bool) -> None:
        """Replace this rank's batches by those of all ranks; by none if not wanted."""
        inputs = ranks.all_gather_tensors([pair[0] for pair in self.pairs], wanted)
        dense = ranks.all_gather_tensors([pair[1] for pair in self.pairs], wanted)
        self.pairs = list(zip(inputs, dense, strict=True))

    def errors(
        self,
        weight: Tensor,
        solutions: Sequence[Tensor],
        importance: Tensor | None = None,
    ) -> list[float]:
        """Return ||X_dense W^T - X Z^T||^2 / ||X_dense W^T||^2 of each solution Z.

        Args:
            weight: The dense matrix W, [rows, columns].
            solutions: Solutions Z, [rows, columns] each.
            importance: By which the squares of each row's outputs are multiplied, in
                numerator and denominator, [rows]; None for 1.

        Returns:
            Errors in the order of the solutions. Where the denominator is 0: 0 for a
            solution that gives zeros too, else 1.
        """
        numerators, denominator = [0.0] * len(solutions), 0.0
        factors = 1 if importance is None else importance
        for inputs, dense in self.pairs:
            targets = linear(dense, weight)  # X_dense W^T, [tokens, rows]
            denominator += float((targets.square() * factors).sum())
            for index, solution in enumerate(solutions):
                difference = targets - linear(inputs, solution)
                numerators[index] += float((difference.square() * factors).sum())
        return [n / denominator if denominator else float(n > 0) for n in numerators]
