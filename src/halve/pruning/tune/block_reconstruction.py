"""Refining: the kept weights of a block, tuned together to the dense block's outputs.

Once a block is pruned, all that is left in it (kept weights, biases, norms) is tuned by
Adam, so that on the hidden states that really enter it, by way of the pruned blocks
before, it gives what the dense block gives in the dense model. There are no labels, and
only one block and its activations are in memory. Masks are fixed, and applied again
after every step. (As in EBFT, Guo et al. (2024), and 3BASiL's "transformer
matching" (2025); here with the best state on held-out windows kept.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.pruning.observe.block_state import BlockState

# Of Adam at most, as a share of the root mean square of a parameter.
_RATE = 0.015
# Share of that which is left at the end, and share of the steps until it is reached.
_LEAST, _WARM = 0.05, 0.1
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TuneOptions:
    """How a block is tuned.

    Attributes:
        epochs: Passes over the windows that are fitted to.
        seed: Shuffles the batches.
    """

    epochs: int
    seed: int


@dataclass(frozen=True)
class TuneResult:
    """What refining brought: ||Y - Y'||^2 / ||Y||^2 of outputs on held-out windows.

    Attributes:
        before: Of the block as it was pruned.
        after: Of the block as it is now; never more.
    """

    before: float
    after: float


def refine(
    state: BlockState, dtypes: dict[str, torch.dtype], refining: TuneOptions
) -> TuneResult:
    """Tune a pruned block; it is left as it was where that brings nothing.

    Args:
        state: The block. Its own stream stands before it, the dense one behind it.
        dtypes: Parameter -> dtype it is stored in, for those that may change.
        refining: How.

    Returns:
        Errors before and after, both with parameters rounded to those dtypes.

    Cost:
        An epoch is a forward and a backward pass, as much as three passes of the block.
        Of memory, four copies of its parameters (their values, gradients and two
        moments), and one batch's activations.
    """
    tuning = _Tuning(state, dtypes, refining)
    before = best = tuning.held_out_error()
    for _ in range(refining.epochs):
        tuning.epoch()
        error = tuning.held_out_error()
        if error < best:
            best = error
            tuning.keep()
    tuning.install_best()
    return TuneResult(before, best)


class _Tuning:
    """Parameters on their way, and the best that were met."""

    def __init__(
        self, state: BlockState, dtypes: dict[str, torch.dtype], refining: TuneOptions
    ) -> None:
        self.state = state
        self.dtypes = dtypes
        parts = list(state.stream.steps())
        self.held_out = [part for part in parts if state.stream.is_held_out(part)]
        self.fitted = [part for part in parts if not state.stream.is_held_out(part)]
        self.ranks = state.ranks
        # All ranks take a step together; one that has no batch left waits for the rest.
        self.steps = max(self.ranks.all_gather(len(self.fitted)))
        self.generator = torch.Generator().manual_seed(refining.seed)
        self.parameters = {path: state.block.get_parameter(path) for path in dtypes}
        self.first = {path: p.data for path, p in self.parameters.items()}
        self.values = {
            path: value.to(torch.float32, copy=True)
            for path, value in self.first.items()
        }
        self.best: dict[str, Tensor] = {}
        self.kept = {
            path: (self.first[path] != 0) | (not stay)
            for path, stay in state.solved.items()
            if path in self.first
        }
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.parameters[path]], "lr": _RATE * size}
                for path, size in self._sizes().items()
            ],
            betas=_BETAS,
        )
        steps = refining.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: _share_of_rate(step / max(steps, 1))
        )

    def _sizes(self) -> dict[str, float]:
        """Return how large a parameter's steps are: as large as it is itself.

        A bias may be all zeros, so vectors are taken for as large as the matrices.
        """
        own = {path: _size(value) for path, value in self.values.items()}
        least = min((own[path] for path in self.kept), default=0.0)
        return {
            p: size if p in self.kept else max(size, least) for p, size in own.items()
        }

    def epoch(self) -> None:
        """Take one step for every batch that is fitted to, in random order."""
        order = torch.randperm(self.steps, generator=self.generator)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for index in order.tolist():
            self._step(self.fitted[index : index + 1])
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def _step(self, parts: list[slice]) -> None:
        # Straight through: the gradient of rounded weights moves the unrounded ones.
        self._put(self._on_grids())
        if self.ranks.size == 1:
            with torch.enable_grad():
                self._loss(parts[0]).backward()
        else:
            self._backward_together(parts)
        self._put(self.values)
        self.optimiser.step()
        for path, kept in self.kept.items():
            self.values[path].mul_(kept)
        self.optimiser.zero_grad()
        self.schedule.step()

    def _backward_together(self, parts: list[slice]) -> None:
        """Find the gradients of the loss of all ranks' batches taken as one.

        Args:
            parts: This rank's batch, or none.
        """
        with torch.enable_grad():
            losses = [self._lost_and_kept(part) for part in parts]
            (kept,) = self.ranks.all_sum(sum(float(kept) for _, kept in losses))
            for lost, _ in losses:
                (lost / kept).backward()
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.all_reduce_(parameter.grad)

    def _loss(self, part: slice) -> Tensor:
        lost, kept = self._lost_and_kept(part)
        return lost / kept

    def _lost_and_kept(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return ||Y - Y'||^2 and ||Y||^2 of a batch."""
        state = self.state
        outputs = state.stream.run(state.block, state.planned.index, part)
        wanted = state.dense_stream.hidden[part].to(outputs.device)
        return (outputs - wanted).square().sum(), wanted.square().sum()

    def held_out_error(self) -> float:
        """Return the error of the parameters as they would be stored."""
        self._put(self._rounded())
        losses = [float(self._loss(part)) for part in self.held_out]
        total, batches = self.ranks.all_sum(sum(losses), len(losses))
        return total / batches

    def keep(self) -> None:
        """Remember the parameters as the best so far."""
        self.best = self._rounded()

    def install_best(self) -> None:
        """Leave the best parameters in the block, the first where none were better."""
        self._put(self.first)
        for path, value in self.best.items():
            self.ranks.broadcast_(value)  # processors may round each in its own way
            self.state.exchange(path, value)

    def _on_grids(self) -> dict[str, Tensor]:
        quant_params = self.state.quant_params
        return {
            p: quant_params[p](v) if p in quant_params else v
            for p, v in self.values.items()
        }

    def _rounded(self) -> dict[str, Tensor]:
        found = self._on_grids()
        # Copied even where nothing is rounded: the values go on being tuned.
        return {
            p: v.to(self.dtypes[p]).to(v.dtype, copy=True) for p, v in found.items()
        }

    def _put(self, values: dict[str, Tensor]) -> None:
        for path, parameter in self.parameters.items():
            parameter.data = values[path]


def _share_of_rate(done: float) -> float:
    """Return how much of the full rate is used: a rise, then a cosine to a little.

    Adam's first steps have no memory, and are as large as they can be.
    """
    return min(done / _WARM, 1.0) * (
        _LEAST + (1 - _LEAST) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    )


def _size(values: Tensor) -> float:
    """Return the root mean square of what is not zero."""
    kept = values[values != 0]
    return float(kept.square().mean().sqrt()) if len(kept) else 0.0
