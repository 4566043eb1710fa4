"""How much each row of a block's matrices matters to what the block returns.

Where a matrix returns u_t for a token t and the block Y_t, an error e in u changes the
block's outputs by about J e, with J = dY / du. For a random v with independent standard
normal entries, the gradient of

    sum over tokens t of v_t . Y_t / ||Y_t||

by u is g = J^T (v_t / ||Y_t||)_t, and E[g_r^2] is the sum of squares of column r of J,
each token's rows divided by ||Y_t||: the error of the block, each token's relative to
its own size, that an error of 1 in row r alone causes (the estimator of Hutchinson,
1990). Its mean over tokens is the row's importance. A column of J that belongs to a key
or a gate is many times larger for some rows than for others.

GuidedQuant (Kim et al., 2025) weighs rows by gradients of the loss of the whole model.
Those of the block's own outputs order the rows of q_proj and k_proj of SmolLM2-135M
alike (docs/log.md), and need no pass over the whole model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halve.calibration_stats import ColumnNorms
from halve.errors import NumericalError, UnsupportedModelError
from halve.layout import PlannedMatrix
from halve.pruning.observe.block_state import BlockState, flat
from halve.pruning.observe.output_error import token_squares

# Of the mean importance, what is added to that of each row: one that does not seem to
# matter on a few windows is not given up.
_FLOOR = 0.01
# A forward and a backward pass, and the activations that are kept in between, are as
# much as three forward passes.
_FORWARD_PASSES = 3
# Seeds of the windows of two blocks differ by at least this.
_BLOCK_SEEDS = 2**20


@dataclass(frozen=True)
class ImportanceOptions:
    """How the importance of rows is measured.

    Attributes:
        samples: Windows on which it is measured; all that there are, if fewer.
        seed: Seed of the random directions.
    """

    samples: int
    seed: int


def importance_nbytes(narrow: int, batch: int) -> dict[str, int]:
    """Return the bytes that it takes beside a block's weights, by use.

    Args:
        narrow: Weights of the block in 16 bits, whose float32 copies autograd keeps.
        batch: Bytes of activations of one batch in a forward pass.
    """
    return {"float32 copies": 4 * narrow, "activations": _FORWARD_PASSES * batch}


def importance_passes(samples: int, windows: int) -> float:
    """Return how many forward passes over all windows it costs as much as."""
    return _FORWARD_PASSES * min(samples, windows) / windows


def measure_importance(
    state: BlockState, options: ImportanceOptions
) -> dict[str, Tensor]:
    """Measure the importance of the rows of a dense block.

    Args:
        state: The block; no matrix may have been replaced yet.
        options: On how many windows.

    Returns:
        Name of a matrix -> importance of its rows, [rows], float32, with a mean of 1.
        Empty for a block with experts, which see different tokens.

    Raises:
        NumericalError: Gradients are not finite.

    Cost:
        See `importance_nbytes` and `importance_passes`.
    """
    matrices = state.planned.matrices
    if any(planned.matrix.expert is not None for planned in matrices):
        return {}
    stream = state.stream
    device = stream.model.device
    sums = {m.name: ColumnNorms(m.matrix.shape[0], device) for m in matrices}
    for part in stream.batches():
        first = stream.numbers[part.start]  # the lowest of the batch
        if first < options.samples and not stream.is_held_out(part):
            _add_batch(state, part, sums, options)
    return {name: _finished(state, name, squares) for name, squares in sums.items()}


def _add_batch(
    state: BlockState,
    part: slice,
    sums: dict[str, ColumnNorms],
    options: ImportanceOptions,
) -> None:
    """Add the squares of the gradients of one batch."""
    with _leaves(state.block, state.planned.matrices) as leaves, torch.enable_grad():
        outputs = state.stream.run(state.block, state.planned.index, part)
        directions = _directions(state, part, outputs.detach(), options)
        with _differentiating(state.planned.name):
            outputs.backward(directions)
    for name, own in leaves.items():
        for leaf in own:
            if leaf.grad is not None:  # else the outputs do not depend on it
                sums[name].add(flat(leaf.grad))


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
    block: nn.Module, matrices: tuple[PlannedMatrix, ...]
) -> Iterator[dict[str, list[Tensor]]]:
    """Add zeros to the outputs of matrices, whose gradients are those of the outputs.

    Yields:
        Name of a matrix -> the zeros of each of its calls.
    """
    leaves: dict[str, list[Tensor]] = {planned.name: [] for planned in matrices}
    handles = []

    def watch(planned: PlannedMatrix) -> None:
        def add_leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
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


def _directions(
    state: BlockState, part: slice, outputs: Tensor, options: ImportanceOptions
) -> Tensor:
    """Return v_t / ||Y_t|| for the outputs Y of a batch, samples first.

    Those of a window do not depend on what it shares a batch or a process with. They
    are zero for windows that are not looked at.
    """
    directions = torch.zeros(outputs.shape)
    for one, number in zip(directions, state.stream.numbers[part], strict=True):
        if number < options.samples:
            seed = options.seed + number + _BLOCK_SEEDS * state.planned.index
            one.normal_(generator=torch.Generator().manual_seed(seed))
    sizes = token_squares(outputs).sqrt().unsqueeze(-1)
    return directions.to(outputs.device) / sizes


def _finished(state: BlockState, name: str, squares: ColumnNorms) -> Tensor:
    """Return the importance of rows, given this rank's sums of squares."""
    squares.finish(state.ranks.all_reduce_)
    if not squares.is_finite():
        raise NumericalError(
            f"The gradients at the outputs of {name} are not finite.",
            "Check the checkpoint and the calibration text, or set importance_samples "
            "to 0 (--importance-samples).",
        )
    found, mean = squares.squares, squares.squares.mean()
    if not mean:
        return torch.ones_like(found)
    return (found / mean + _FLOOR) / (1 + _FLOOR)
