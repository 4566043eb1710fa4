"""Block reconstruction: tune a pruned block so that it reproduces the dense one.

Once the matrices of a block are pruned, all parameters that are left in it (unpruned
weights, biases, norms) are tuned together by Adam. The input is the hidden states that
reach the block in the pruned model, X'; the target is the dense block's output in the
dense model, Y = f(X). The loss of a batch is the mean over its tokens t of

    ||Y_t - f'(X')_t||^2 / ||Y_t||^2,

so that tokens which are far larger than the rest do not count for all.

There are no labels, and only one block and its activations are in memory. Masks are
fixed and re-applied after every step. After each epoch the error on held-out windows is
measured, and the best parameters are the ones that are stored. Steps are taken in mixed
precision where the processor has bfloat16 (`numerics.matmul`); errors are measured in
float32.

How large a step a block stands depends on the model: Gemma 3, in which normalizations
follow the matrices, takes a quarter of what suits Llama. So a block that no epoch makes
better begins again with smaller steps.

As in EBFT (Guo et al., 2024) and the "transformer matching" of 3BASiL (2025), except
for the choice of the best epoch on held-out windows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halve.distributed import Ranks
from halve.numerics.learning_rate import parameter_scales, rate_factor
from halve.pruning.observe.block_state import BlockState
from halve.pruning.observe.output_error import relative_squares
from halve.runtime.keep_zeros import set_zeros

# Adam's largest learning rate, as a fraction of the scale of a parameter; the second is
# for blocks that the first makes no better.
_RATES = (0.015, 0.004)
# Steps are too large where an epoch multiplies the held-out error by this. They are the
# largest in the first: blocks that they suit become up to 16 % worse before they become
# better, others 44 % or more (docs/log.md, "steps of --refine").
_WORSE = 1.25
_BETAS = (0.9, 0.95)
# Copies of a block's parameters in float32: the values, their gradients, Adam's two
# moments, the parameters at the start, and the best ones.
_COPIES = 6
# A forward and a backward pass take as many operations as three forward passes. The
# activations saved for the backward pass, and their gradients, take as much memory as
# three forward passes.
_FORWARD_PASSES = 3


@dataclass(frozen=True)
class TuneOptions:
    """How a block is tuned.

    Attributes:
        epochs: Passes over the calibration windows that are not held out.
        seed: Seed for the order of the batches.
    """

    epochs: int
    seed: int


@dataclass(frozen=True)
class TuneResult:
    """Mean over tokens t of ||Y_t - Y'_t||^2 / ||Y_t||^2, on held-out windows.

    Attributes:
        before: Error of the block as it was pruned.
        after: Error of the block as it is stored; never greater.
    """

    before: float
    after: float


def tuning_nbytes(parameters: int, weights: int, batch: int) -> dict[str, int]:
    """Return the bytes that tuning a block takes beside its weights, by use.

    Args:
        parameters: Number of parameters in the block.
        weights: Number of weights in its prunable matrices.
        batch: Bytes of activations of one batch in a forward pass.
    """
    return {
        "masks": weights,  # bool
        "copies": _COPIES * 4 * parameters,
        "activations": _FORWARD_PASSES * batch,
    }


def tuning_passes(epochs: int) -> int:
    """Return how many forward passes over all windows tuning costs as much as."""
    return _FORWARD_PASSES * epochs


def refine(
    state: BlockState, dtypes: dict[str, torch.dtype], refining: TuneOptions
) -> TuneResult:
    """Tune a pruned block; it stays as it was where no epoch reduces the error.

    Args:
        state: The block. Its pruned stream holds the block's inputs X'; its dense
            stream has already passed the block and holds the targets Y.
        dtypes: Path of each parameter that may change -> dtype it is stored in.
        refining: Number of epochs, and the seed.

    Returns:
        Errors before and after, both measured with the parameters rounded to those
        dtypes and, if the block is quantized, to its quantization grids.

    Cost:
        See `tuning_nbytes` and `tuning_passes`; up to twice as many passes where the
        first steps are too large.
    """
    rate, *smaller = _RATES
    result = _Tuning.start(state, dtypes, refining, rate).run(refining.epochs)
    for rate in smaller:
        if result.after < result.before:
            break
        result = _Tuning.start(state, dtypes, refining, rate).run(refining.epochs)
    return result


@dataclass
class _Tuning:
    """The state of Adam on one block.

    Dictionaries map the path of a parameter within the block to a value.

    Attributes:
        state: The block.
        dtypes: Dtypes in which parameters are stored.
        fitted: This rank's batches that are fitted to.
        held_out: This rank's held-out batches.
        steps: Steps in an epoch.
        generator: Draws the order of the batches.
        parameters: The module's parameters.
        first: Values at the start, as they are in the block.
        values: Values that are tuned, float32.
        zeros: True where a weight stays zero, for pruned matrices only.
        optimizer: Adam, over `parameters`.
        schedule: Learning rate over the steps.
        best: Stored values of the best epoch; empty while none beats the start.
    """

    state: BlockState
    dtypes: dict[str, torch.dtype]
    fitted: list[slice]
    held_out: list[slice]
    steps: int
    generator: torch.Generator
    parameters: dict[str, nn.Parameter]
    first: dict[str, Tensor]
    values: dict[str, Tensor]
    zeros: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        state: BlockState,
        dtypes: dict[str, torch.dtype],
        options: TuneOptions,
        rate: float,
    ) -> "_Tuning":
        """Copy the parameters to float32 and set up Adam."""
        batches = list(state.stream.steps())
        fitted = [part for part in batches if not state.stream.is_held_out(part)]
        # A step needs all ranks; one without a batch left adds a gradient of zero.
        steps = max(state.ranks.all_gather(len(fitted)))
        parameters = {path: state.block.get_parameter(path) for path in dtypes}
        first = {path: parameter.data for path, parameter in parameters.items()}
        values = {p: value.to(torch.float32, copy=True) for p, value in first.items()}
        zeros = {
            # Where nothing was pruned, a weight that was rounded to 0 may change.
            path: (first[path] == 0) & stays_zero
            for path, stays_zero in state.solved.items()
            if path in first
        }
        optimizer = _adam(parameters, parameter_scales(values, zeros.keys()), rate)
        return cls(
            state=state,
            dtypes=dtypes,
            fitted=fitted,
            held_out=[part for part in batches if state.stream.is_held_out(part)],
            steps=steps,
            generator=torch.Generator().manual_seed(options.seed),
            parameters=parameters,
            first=first,
            values=values,
            zeros=zeros,
            optimizer=optimizer,
            schedule=_schedule(optimizer, options.epochs * steps),
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that tune the block together."""
        return self.state.ranks

    def run(self, epochs: int) -> TuneResult:
        """Take so many epochs, and put the best parameters into the block.

        Ends early where steps are too large.
        """
        before = lowest = self.held_out_error()
        for _ in range(epochs):
            self.epoch()
            error = self.held_out_error()
            if error < lowest:
                lowest = error
                self.remember_best()
            if not error <= _WORSE * before:  # or it is not a number
                break
        self.install_best()
        # torch's optimizers are in reference cycles: Adam's moments would stay in
        # memory beside those of the next attempt, or block.
        self.optimizer.state.clear()
        return TuneResult(before, lowest)

    def epoch(self) -> None:
        """Take one step for every batch that is fitted to, in random order."""
        order = torch.randperm(self.steps, generator=self.generator)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for index in order.tolist():
            self._step(self.fitted[index : index + 1])
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def _step(self, batches: list[slice]) -> None:
        """Take one step of Adam.

        Args:
            batches: This rank's batch, or none.
        """
        # Straight-through estimator: the gradient is taken at the quantized weights,
        # and moves the unquantized ones.
        self._set_parameters(self._fake_quantized())
        if self.ranks.size == 1:
            with torch.enable_grad():
                self._loss(batches[0]).backward()
        else:
            self._backward_together(batches)
        self._set_parameters(self.values)
        self.optimizer.step()
        for path, zeros in self.zeros.items():  # Adam moves zeros as well
            # Times 0, a weight below zero would be -0.0, which packing stores.
            set_zeros(self.values[path], zeros)
        self.optimizer.zero_grad()
        self.schedule.step()

    def _backward_together(self, batches: list[slice]) -> None:
        """Compute gradients of the loss over the batches of all ranks as one batch.

        That loss is the mean over the tokens of all ranks, so each rank divides the sum
        over its own tokens by the common number, and gradients are summed.

        Args:
            batches: This rank's batch, or none.
        """
        with torch.enable_grad():
            errors = [self._errors(part) for part in batches]
            (total,) = self.ranks.all_sum(sum(each.numel() for each in errors))
            for each in errors:
                (each.sum() / total).backward()
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.all_reduce_(parameter.grad)

    def _loss(self, part: slice) -> Tensor:
        """Return the mean error of a batch's tokens."""
        return self._errors(part).mean()

    def _errors(self, part: slice) -> Tensor:
        """Return ||Y_t - Y'_t||^2 / ||Y_t||^2 of a batch, [windows, tokens]."""
        state = self.state
        outputs = state.stream.run(state.block, state.planned.index, part)  # Y'
        targets = state.dense_stream.hidden[part].to(outputs.device)  # Y
        return relative_squares(outputs, targets)

    def held_out_error(self) -> float:
        """Return the mean loss of the held-out batches, with parameters as stored."""
        self._set_parameters(self._as_stored())
        losses = [float(self._loss(part)) for part in self.held_out]
        total, batches = self.ranks.all_sum(sum(losses), len(losses))
        return total / batches

    def remember_best(self) -> None:
        """Remember the parameters as the best so far."""
        self.best = self._as_stored()

    def install_best(self) -> None:
        """Put the best parameters into the block, or the first if none were better."""
        self._set_parameters(self.first)
        for path, value in self.best.items():
            # Ranks may run on different processors, whose results differ in last bits.
            self.ranks.broadcast_(value)
            self.state.exchange(path, value)

    def _fake_quantized(self) -> dict[str, Tensor]:
        """Return the values, those of quantized matrices rounded to their grids."""
        fake_quantize = self.state.quant_params
        return {
            p: fake_quantize[p](v) if p in fake_quantize else v
            for p, v in self.values.items()
        }

    def _as_stored(self) -> dict[str, Tensor]:
        """Return copies of the values, rounded to what the output will hold."""
        # Copied even where nothing is rounded, since tuning changes them in place.
        return {
            p: v.to(self.dtypes[p]).to(v.dtype, copy=True)
            for p, v in self._fake_quantized().items()
        }

    def _set_parameters(self, values: dict[str, Tensor]) -> None:
        for path, parameter in self.parameters.items():
            parameter.data = values[path]


def _adam(
    parameters: dict[str, nn.Parameter], scales: dict[str, float], rate: float
) -> torch.optim.Optimizer:
    """Return Adam with a learning rate in proportion to each parameter's scale."""
    groups = [
        {"params": [parameters[path]], "lr": rate * scale}
        for path, scale in scales.items()
    ]
    return torch.optim.Adam(groups, betas=_BETAS)


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rate's schedule over so many steps."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor((step + 1) / max(steps, 1))
    )
