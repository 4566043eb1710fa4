"""The loop of recovery: steps of AdamW, judged on held-out windows.

Nothing grows with the number of steps. Windows go through both models a few at a time.
Where the activations of all blocks would not fit into memory, blocks are run again in
the backward pass, so that only their inputs, one block's activations, and the logits
are in memory.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halve.checkpoint import Workspace
from halve.errors import NumericalError
from halve.options import RecoverOptions
from halve.records import Progress, StateRecord
from halve.recovery.divergence import divergence_and_gradient
from halve.recovery.optimizer import make_optimizer, set_rate
from halve.recovery.saved_state import Run, load_run, save_run
from halve.recovery.student import Student
from halve.recovery.windows import RecoveryWindows
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.whole_model import logits_of

# Steps where neither they nor a time was asked for.
DEFAULT_STEPS = 512
# The state is judged, and saved, so often in a run, after equal numbers of steps.
_JUDGED = 16
# Logits of one model that are in memory at once: 256 MiB of float32, or one window's.
_MAX_LOGITS = 2**26
_STEPS = "steps"
# Steps that are timed where a time was given.
_TIMED = 4


@dataclass(frozen=True)
class Distillation:
    """What the loop works with.

    Attributes:
        student: The pruned model, loaded.
        dense: The dense model, loaded.
        windows: What both read.
        options: Steps, windows in a step, and learning rate.
        workspace: Where the state is saved.
    """

    student: Student
    dense: BlockwiseModel
    windows: RecoveryWindows
    options: RecoverOptions
    workspace: Workspace


def distill(job: Distillation) -> tuple[Run, int]:
    """Train a student, from where an earlier run stopped.

    Returns:
        Where it ended, and the number of steps that it took in all.

    Raises:
        NumericalError: The divergence of the input, or the loss, is not finite.
    """
    optimizer = make_optimizer(job.student, job.options.learning_rate)
    run = load_run(job.workspace, job.student, optimizer)
    if run is None:
        run = Run(0, [], {})
        _judge(job, run)
    steps = _decide_steps(job)
    pace = _Pace(job.options.progress, steps, run.step, time.monotonic())
    while run.step < steps:
        pace.report(run)
        set_rate(optimizer, run.step, steps)
        _step(job, optimizer, run.step)
        run.step += 1
        if run.step == steps or run.step % max(steps // _JUDGED, 1) == 0:
            _judge(job, run)
            save_run(job.workspace, run, job.student, optimizer)
    return run, steps


@dataclass(frozen=True)
class _Pace:
    """Reports progress, with the time left as estimated from the steps so far."""

    callback: Callable[[Progress], None]
    steps: int
    first: int
    started: float

    def report(self, run: Run) -> None:
        done = run.step - self.first
        elapsed = time.monotonic() - self.started
        left = elapsed / done * (self.steps - run.step) if done else None
        phase = f"held-out divergence {run.lowest.divergence:.5f}"
        self.callback(Progress(run.step, self.steps, phase, left))


def _decide_steps(job: Distillation) -> int:
    """Return the number of steps, timed and decided once where a time was given."""
    options = job.options
    if options.minutes is None:
        return options.steps or DEFAULT_STEPS
    if _STEPS not in job.workspace.decisions:
        judging = _JUDGED * _seconds(lambda: _held_out_divergence(job))
        steps = int((60 * options.minutes - judging) / _step_seconds(job))
        job.workspace.decide(_STEPS, {"count": max(steps, 1)})
    return job.workspace.decisions[_STEPS]["count"]


def _step_seconds(job: Distillation) -> float:
    """Return how long a step takes; its parameters stay as they are."""
    optimizer = make_optimizer(job.student, 0.0)
    _step(job, optimizer, 0)  # the first is slower than those that follow
    return _seconds(lambda: [_step(job, optimizer, 0) for _ in range(_TIMED)]) / _TIMED


def _seconds(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _step(job: Distillation, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take one step, on the next windows in turn."""
    loss = _accumulate(job, step)
    if not loss.isfinite():
        raise NumericalError(
            f"The loss of step {step + 1} is not finite.",
            "Lower the learning rate (--lr), and choose another folder.",
        )
    job.student.apply_zeros_to_gradients()
    optimizer.step()
    job.student.apply_zeros()
    _clear_gradients(job.student)


def _clear_gradients(student: Student) -> None:
    for parameter in student.parameters.values():
        parameter.grad = None


def _accumulate(job: Distillation, step: int) -> Tensor:
    """Add the gradients of the mean divergence of a step's windows; return it."""
    training, batch = job.windows.training, job.options.batch
    chosen = (torch.arange(batch) + step * batch) % len(training)
    tokens = chosen.numel() * training.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for parameter in job.student.parameters.values():
        parameter.requires_grad_(True)
    for ids in _split(job, training[chosen]):
        with torch.no_grad():
            dense = logits_of(job.dense, ids, mixed=True).float()
        with torch.enable_grad():
            logits = logits_of(job.student.model, ids).float()
        divergence, gradient = divergence_and_gradient(logits.detach(), dense)
        job.student.backward(logits, gradient.div_(tokens))
        total += divergence.cpu()
    for parameter in job.student.parameters.values():
        parameter.requires_grad_(False)
    return total / tokens


def _split(job: Distillation, windows: Tensor) -> Iterator[Tensor]:
    """Yield windows, as many at a time as run through a model together."""
    length = windows.shape[1]
    vocabulary = job.student.model.meta_model.vocabulary
    by_logits = max(_MAX_LOGITS // (length * vocabulary), 1)
    yield from windows.split(min(by_logits, job.student.model.batch(length)))


def _judge(job: Distillation, run: Run) -> None:
    """Judge the student, and remember it if it is the best so far."""
    values = job.student.as_stored()
    with job.student.holding(values):
        divergence = _held_out_divergence(job)
    is_best = bool(run.states) and divergence < run.lowest.divergence
    run.states.append(StateRecord(run.step, divergence))
    if is_best:
        run.best = values


@torch.no_grad()
def _held_out_divergence(job: Distillation) -> float:
    """Return the mean divergence of the held-out windows, in nats per token.

    Raises:
        NumericalError: It is not finite.
    """
    windows = job.windows.held_out
    total = 0.0
    for ids in _split(job, windows):
        dense = logits_of(job.dense, ids).float()
        logits = logits_of(job.student.model, ids).float()
        total += float(divergence_and_gradient(logits, dense)[0])
    divergence = total / windows.numel()
    if not math.isfinite(divergence):
        raise NumericalError(
            "The divergence of the held-out windows is not finite.",
            "Check both checkpoints; if they are sound, lower the learning rate (--lr) "
            "and choose another folder.",
        )
    return divergence
