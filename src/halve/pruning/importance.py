"""How much each row of a model's matrices matters to the model's predictions.

An unstructured mask decides between weights of different rows, whose outputs do not
matter alike: an error in one row of q_proj may change the predictions a hundred times
more than the same error in another. If the outputs u of a matrix are off by e, and the
errors of different rows are independent of each other, the predictions diverge by about

    KL = 1/2 sum over rows r of F_r e_r^2,   F_r = E[(d log p(y) / d u_r)^2],

with y drawn from the model's own predictions: F is the diagonal of the Fisher
information. Its mean over tokens is the importance of a row (as in GuidedQuant, Kim et
al., 2025, which averages it over groups of rows).

The dense model runs on a few windows, and its hidden states between blocks are kept;
then gradients pass through the blocks from the last to the first, one block in memory.
Their squares, and those of the inputs, also say how much each weight is worth, and so
how the sparsity should be distributed over the matrices (`saliency`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.calibration_stats import ColumnNorms
from halve.errors import NumericalError, UnsupportedModelError
from halve.layout import PlannedBlock, PlannedMatrix
from halve.pruning.observe.block_state import flat, weight_path
from halve.pruning.saliency import log_saliency, saliency_nbytes
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.hidden_states import place_hidden
from halve.runtime.prediction_gradient import prediction_gradient
from halve.runtime.stream import Stream

# Of the mean importance, what is added to that of each row: one that does not seem to
# matter on a few windows is not given up.
_FLOOR = 0.01
# A forward and a backward pass, and the activations that are kept in between, are as
# much as three forward passes; another one has run before.
_FORWARD_PASSES = 3


def importance_nbytes(narrow: int, batch: int) -> dict[str, int]:
    """Return the bytes that it takes beside a block's weights, by use.

    Args:
        narrow: Weights of the block in 16 bits, whose float32 copies autograd keeps.
        batch: Bytes of activations of one batch in a forward pass.
    """
    return {
        "float32 copies": 4 * narrow,
        "activations": _FORWARD_PASSES * batch,
        "saliency": saliency_nbytes(),
    }


def importance_passes(samples: int, windows: int) -> float:
    """Return how many forward passes over all windows it costs as much as."""
    return (_FORWARD_PASSES + 1) * min(samples, windows) / windows


@dataclass(frozen=True)
class Importance:
    """What matters to a model's predictions. Both are empty where nothing is known.

    Attributes:
        rows: Name of a matrix -> importance of its rows, [rows], float32, with a mean
            of 1.
        saliency: Name of a matrix -> quantiles of the logarithms of its weights'
            saliencies (`log_saliency`).
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    saliency: dict[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: "Importance") -> "Importance":
        """Return the union of two that know of different matrices."""
        return Importance(self.rows | other.rows, self.saliency | other.saliency)


@dataclass(frozen=True)
class ImportanceRun:
    """Where the importance of rows, and of weights, is measured.

    Attributes:
        model: The dense model.
        blocks: Its blocks; none has experts, each of which would see other tokens.
        windows: The windows that are looked at, [samples, length], int64.
        budget: Bytes in memory allowed for hidden states.
        folder: The folder of memory-mapped files for those past it.
        report: Called with the index of a block and a phase.
    """

    model: BlockwiseModel
    blocks: tuple[PlannedBlock, ...]
    windows: Tensor
    budget: int
    folder: Path | None
    report: Callable[[int, str], None]

    def measure(self) -> Importance:
        """Measure what matters in all matrices.

        Raises:
            NumericalError: Gradients are not finite.
            UnsupportedModelError: A block has no gradients.

        Cost:
            The model is read twice; see also `importance_nbytes` and
            `importance_passes`.
        """
        stream = Stream.start(self.model, self.windows, self.budget, self.folder)
        backward = _Backward(stream, self._run_dense(stream))
        found = Importance()
        for planned in reversed(self.blocks):
            self.report(planned.index, "weighing rows")
            found |= backward.through(planned)
        return found

    def _run_dense(self, stream: Stream) -> list[Tensor]:
        """Advance a stream through all blocks; return what entered each."""
        entering = []
        budget, shape = self.budget // len(self.blocks), tuple(stream.hidden.shape)
        for planned in self.blocks:
            self.report(planned.index, "running dense")
            kept = place_hidden(self.model, shape, budget, self.folder)
            entering.append(kept.copy_(stream.hidden))
            with self.model.block(planned.index) as block:
                stream.advance(block, planned.index)
        return entering


@dataclass
class _Squares:
    """Sums of squares over the tokens of one matrix.

    Attributes:
        gradients: Of log p(y), by the matrix's outputs.
        inputs: Of its inputs.
        tokens: Number of tokens.
    """

    gradients: ColumnNorms
    inputs: ColumnNorms
    tokens: int = 0

    @classmethod
    def zeros(cls, planned: PlannedMatrix, device: torch.device) -> "_Squares":
        """Start the sums of a matrix."""
        rows, columns = planned.matrix.shape
        return cls(ColumnNorms(rows, device), ColumnNorms(columns, device))

    def add_inputs(self, inputs: Tensor) -> None:
        """Add inputs, [..., columns]."""
        tokens = flat(inputs.detach()).float()
        self.inputs.add(tokens)
        self.tokens += len(tokens)

    def importance(self, planned: PlannedMatrix, block: nn.Module) -> Importance:
        """Return what matters in the matrix."""
        self.gradients.finish()
        self.inputs.finish()
        self._check(planned.name)
        rows = _finished(self.gradients.squares)
        tokens = max(self.tokens, 1)
        # Rows have a mean of 1: times the mean of F they are F, with its floor.
        factor = self.gradients.squares.mean() / tokens
        stored = block.get_parameter(weight_path(planned)).data
        saliency = log_saliency(
            planned.matrix.as_rows(stored),
            rows * factor,
            self.inputs.squares / tokens,
        )
        return Importance({planned.name: rows}, {planned.name: saliency})

    def _check(self, name: str) -> None:
        if not (self.gradients.is_finite() and self.inputs.is_finite()):
            raise NumericalError(
                f"The gradients at the outputs of {name}, or its inputs, are not "
                "finite.",
                "Check the checkpoint and the calibration text, or set "
                "importance_samples to 0 (--importance-samples).",
            )


class _Backward:
    """Gradients on their way from the predictions to the first block.

    Attributes:
        stream: Where the dense model's blocks run.
        entering: Hidden states that enter each block that is left.
        gradient: Of log p(y) by what leaves the last of those, samples first.
    """

    def __init__(self, stream: Stream, entering: list[Tensor]) -> None:
        self.stream = stream
        self.entering = entering
        self.gradient = prediction_gradient(stream)

    def through(self, planned: PlannedBlock) -> Importance:
        """Carry the gradient through a block; return what matters in it."""
        device = self.stream.model.device
        sums = {m.name: _Squares.zeros(m, device) for m in planned.matrices}
        self.stream.hidden = self.entering.pop()
        with self.stream.model.block(planned.index) as block:
            for part in self.stream.batches():
                self._through_batch(block, planned, part, sums)
            found = Importance()
            for matrix in planned.matrices:
                found |= sums[matrix.name].importance(matrix, block)
        return found

    def _through_batch(
        self,
        block: nn.Module,
        planned: PlannedBlock,
        part: slice,
        sums: dict[str, _Squares],
    ) -> None:
        """Replace a batch's gradient, and add the squares of those of its matrices."""
        hidden = self.stream.hidden[part].detach().requires_grad_()
        with _leaves(block, planned.matrices, sums) as leaves, torch.enable_grad():
            outputs = self.stream.run(block, planned.index, part, hidden)
            with _differentiating(planned.name):
                outputs.backward(self.gradient[part].to(outputs.device))
        for name, own in leaves.items():
            for leaf in own:
                if leaf.grad is not None:  # else the outputs do not depend on it
                    sums[name].gradients.add(flat(leaf.grad))
        assert hidden.grad is not None, "blocks add to what enters them"
        self.gradient[part] = hidden.grad


@contextmanager
def _differentiating(block: str) -> Iterator[None]:
    """Turn torch's errors about code without gradients into UnsupportedModelError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # handled by `with_smaller_batches`
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"Block {block} cannot be differentiated ({str(error)[:160]}).",
            "Set importance_samples to 0 (--importance-samples).",
        ) from error


@contextmanager
def _leaves(
    block: nn.Module, matrices: tuple[PlannedMatrix, ...], sums: dict[str, _Squares]
) -> Iterator[dict[str, list[Tensor]]]:
    """Add zeros to the outputs of matrices, whose gradients are those of the outputs.

    The inputs are added to the sums.

    Yields:
        Name of a matrix -> the zeros of each of its calls.
    """
    leaves: dict[str, list[Tensor]] = {planned.name: [] for planned in matrices}
    handles = []

    def watch(planned: PlannedMatrix) -> None:
        def add_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
            sums[planned.name].add_inputs(args[0])
            leaf = torch.zeros_like(output, requires_grad=True)
            leaves[planned.name].append(leaf)
            return output + leaf

        module = block.get_submodule(planned.matrix.path)
        handles.append(module.register_forward_hook(add_leaf))

    try:
        for planned in matrices:
            watch(planned)
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _finished(squares: Tensor) -> Tensor:
    """Return the importance of rows, given the sums of squares of their gradients."""
    mean = squares.mean()
    if not mean:
        return torch.ones_like(squares)
    return (squares / mean + _FLOOR) / (1 + _FLOOR)
