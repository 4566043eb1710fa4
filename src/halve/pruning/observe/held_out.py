"""Held-out inputs of a group, on which candidates for its matrices are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halve.distributed import Ranks
from halve.numerics.matmul import linear
from halve.pruning.observe.output_error import relative_squares

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
        """Return how far the outputs of each solution Z are off, by token.

        With Y = X_dense W^T and Y' = X Z^T that is the mean over tokens t of
        ||Y_t - Y'_t||^2 / ||Y_t||^2, so that a token which is far larger than the rest
        does not decide alone.

        Args:
            weight: The dense matrix W, [rows, columns].
            solutions: Solutions Z, [rows, columns] each.
            importance: By which the squares of each row's outputs are multiplied, in
                numerator and denominator, [rows]; None for 1.

        Returns:
            Errors in the order of the solutions. Where all Y are 0: 0 for a solution
            that gives zeros too, else 1.
        """
        totals, tokens, size = [0.0] * len(solutions), 0, 0.0
        factors = 1 if importance is None else importance.sqrt()
        for inputs, dense in self.pairs:
            targets = linear(dense, weight) * factors  # Y, [tokens, rows]
            tokens, size = tokens + len(targets), size + float(targets.square().sum())
            for index, solution in enumerate(solutions):
                outputs = linear(inputs, solution) * factors
                totals[index] += float(relative_squares(outputs, targets).sum())
        return [total / tokens if size else float(total > 0) for total in totals]
