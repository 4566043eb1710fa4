"""Where a run stands, in memory and in its work folder."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Workspace
from halve.records import StateRecord
from halve.records.codec import from_dict
from halve.recovery.student import Student

# Of AdamW, for each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BEST = "best."


@dataclass
class Run:
    """Where a run stands.

    Attributes:
        step: Number of steps taken.
        states: Every state that was judged, the input first.
        best: The best of them as stored, by parameter; empty where it is the input.
    """

    step: int
    states: list[StateRecord]
    best: dict[str, Tensor]

    @property
    def lowest(self) -> StateRecord:
        """The best state; the earliest of equals."""
        return min(self.states, key=lambda state: state.divergence)


def saved_nbytes(parameters: int) -> int:
    """Return the bytes of two saved states of so many parameters.

    For each a value, Adam's two moments, all float32, and the best value in 16 bits.
    """
    return 2 * (3 * 4 + 2) * parameters


def save_run(
    workspace: Workspace, run: Run, student: Student, optimizer: torch.optim.Optimizer
) -> None:
    """Save where a run stands.

    Cost:
        See `saved_nbytes`.
    """
    tensors = {f"{_BEST}{name}": value for name, value in run.best.items()}
    for name, parameter in student.parameters.items():
        tensors[f"value.{name}"] = parameter.data
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{m}.{name}": state[m] for m in _MOMENTS if m in state}
    states = [asdict(state) for state in run.states]
    workspace.save_state(tensors, {"step": run.step, "states": states})


def load_run(
    workspace: Workspace, student: Student, optimizer: torch.optim.Optimizer
) -> Run | None:
    """Set student and optimizer to where an earlier run stood; None without one."""
    saved = workspace.load_state()
    if saved is None:
        return None
    tensors, note = saved
    for name, parameter in student.parameters.items():
        parameter.data.copy_(tensors[f"value.{name}"])
        moments: dict[str, Any] = {
            m: tensors[f"{m}.{name}"].to(parameter.device)
            for m in _MOMENTS
            if f"{m}.{name}" in tensors
        }
        if moments:
            step = torch.tensor(float(note["step"]))
            optimizer.state[parameter] = {"step": step, **moments}
    best = {n.removeprefix(_BEST): t for n, t in tensors.items() if n.startswith(_BEST)}
    states = [from_dict(StateRecord, state) for state in note["states"]]
    return Run(note["step"], states, best)
