"""The loop over a plan's shards, each committed before the next is begun."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, Workspace, recall
from halve.distributed import ALONE, Ranks
from halve.errors import TargetMissedError
from halve.formats import store
from halve.plan import Plan, PlannedBlock
from halve.pruning.block import Pruned, Task, install, prune_block
from halve.pruning.budget import Patterns, check_budget, exact_patterns
from halve.pruning.candidates import candidates
from halve.pruning.choice import Choice
from halve.pruning.refine import Refining
from halve.pruning.room import make_room
from halve.pruning.scribe import Scribe
from halve.pruning.site import Paths, Site
from halve.pruning.trial import Trials
from halve.pruning.trim import trim
from halve.records import (
    AllocationRecord,
    BlockRecord,
    MatrixRecord,
    Progress,
)
from halve.runtime.stream import Stream
from halve.runtime.streamed import StreamedModel


@dataclass(frozen=True)
class Execution:
    """How a run goes about it; nothing here changes the result.

    Attributes:
        activation_memory: Bytes of hidden states that may live in a process's memory;
            None for a quarter of the machine's, shared by the processes on it.
        memory: Bytes that a process may take, by which that is chosen (`make_room`).
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each phase.
        ranks: The processes that share the work. Their number changes the windows that
            a step of refining sees, and nothing else.
    """

    activation_memory: int | None = None
    memory: int | None = None
    trust_remote_code: bool = False
    progress: Callable[[Progress], None] = lambda progress: None
    ranks: Ranks = ALONE


class Run:
    """A plan in execution, with what it carries from one block to the next."""

    def __init__(
        self,
        plan: Plan,
        execution: Execution,
        scribe: Scribe,
        model: StreamedModel,
        windows: Tensor | None,
    ) -> None:
        self.plan = plan
        self.scribe = scribe
        self.ranks = execution.ranks
        self.candidates = candidates(plan.settings, plan.layout.dtype)
        self.clock = _Clock(execution.progress, len(plan.layout.blocks))
        self.model = model
        limits = (execution.memory, execution.activation_memory)
        self.room = make_room(plan, *limits, self.ranks.local_size)
        self.allocation = self._allocate(windows)
        self.patterns = self._patterns()
        self.budget = self.room.activations // plan.settings.shares
        self.paths = None if windows is None else self._start(windows)

    def _allocate(self, windows: Tensor | None) -> AllocationRecord | None:
        """Return what an earlier run chose, or choose; None where all are alike."""
        if not self.plan.settings.judging:
            return None
        assert windows is not None, "there is no text to judge allocations by"
        trials = Trials(
            plan=self.plan,
            model=self.model,
            windows=windows,
            room=self.room,
            folder=self.scribe.folder,
            report=self.clock.report,
            ranks=self.ranks,
        )
        chosen = self.scribe.settle("allocation", lambda: asdict(trials.choose()))
        return recall(self.scribe.place, AllocationRecord, chosen)

    def _patterns(self) -> list[Patterns]:
        """Return for each block what its matrices shall obey, if that is not alike."""
        if self.allocation is None:
            return [{} for _ in self.plan.layout.blocks]
        return exact_patterns(self.plan, self.allocation.sparsities)

    def _start(self, windows: Tensor) -> Paths:
        settings, where = self.plan.settings, (self.budget, self.scribe.folder)
        held = settings.held_out
        stream = Stream.start(self.model, windows, *where, held, self.ranks)
        return Paths(stream, stream.fork(*where) if settings.has_dense else None)

    def finish(self) -> list[BlockRecord]:
        """Do every shard that is not done.

        Returns:
            What became of the blocks; nothing on ranks that do not write.
        """
        if self.scribe.workspace is not None:
            self._copy_rest(self.scribe.workspace)
        for planned in self.plan.layout.blocks:
            self._block(planned)
        if self.scribe.workspace is None:
            return []
        committed, blocks = self.scribe.workspace.committed, self.plan.layout.blocks
        records = [
            recall(self.scribe.place, BlockRecord, committed[block.shard].note)
            for block in blocks
        ]
        if self.allocation is not None:
            check_budget(self.plan, records)
        return records

    def _copy_rest(self, workspace: Workspace) -> None:
        """Write what lies outside the blocks."""
        own = {block.shard for block in self.plan.layout.blocks}
        for file, names in self.plan.layout.shards.items():
            if file not in own and file not in workspace.committed:
                tensors = self.model.checkpoint.read(names)
                for name, tensor in tensors.items():
                    self.model.check_finite(name, tensor)
                workspace.commit(file, tensors, lambda path: {})

    def _block(self, planned: PlannedBlock) -> None:
        if planned.shard in self.scribe.done:
            self.clock.report(planned.index, "catching up")
            self._catch_up(planned)
        else:
            self._prune(planned)

    def _prune(self, planned: PlannedBlock) -> None:
        self.clock.begin(planned.index)
        settings = self.plan.settings
        task = Task(
            candidates=self.candidates,
            correction=settings.damping if settings.corrects else None,
            refining=Refining(settings.epochs, settings.seed)
            if settings.refine
            else None,
            budget=self.budget,
            folder=self.scribe.folder,
            report=lambda phase: self.clock.report(planned.index, phase),
            patterns=self.patterns[planned.index],
            aside=self.room.aside,
        )
        pruned = prune_block(self.model, self.paths, planned, task)
        task.report("writing")
        if self.scribe.workspace is not None:
            self._write(self.scribe.workspace, planned, pruned)

    def _write(
        self, workspace: Workspace, planned: PlannedBlock, pruned: Pruned
    ) -> None:
        names = self.plan.layout.shards[planned.shard]
        others = [name for name in names if name not in pruned.tensors]
        tensors = self.model.checkpoint.read(others) | self._stored(planned, pruned)
        workspace.commit(
            planned.shard, tensors, lambda path: self._verify(planned, pruned, path)
        )

    def _stored(self, planned: PlannedBlock, pruned: Pruned) -> dict[str, Tensor]:
        """Return pruned matrices as the file will hold them."""
        tensors = dict(pruned.tensors)
        if self.plan.settings.packed:
            for matrix in planned.matrices:
                weight = tensors.pop(matrix.tensor)
                tensors |= store(matrix.tensor, weight, matrix.matrix.transposed)
        return tensors

    def _verify(
        self, planned: PlannedBlock, pruned: Pruned, path: Path
    ) -> dict[str, Any]:
        """Read the file again; return the block's record, or refuse what is in it."""
        written = Checkpoint.of_files([path]).read(pruned.choices)
        matrices: list[MatrixRecord] = []
        for matrix in planned.matrices:
            name, (rows, columns) = matrix.tensor, matrix.matrix.shape
            weight = matrix.matrix.as_rows(written[name])
            choice = pruned.choices[name]
            if (shortfall := _shortfall(choice, weight)) is not None:
                raise TargetMissedError(
                    f"{name} in {path} is not what it should be: {shortfall}.",
                    "Report this as a defect of Halve, with the model's name.",
                )
            sparsity = float((weight == 0).double().mean())
            grid = choice.candidate.grid
            matrices.append(
                MatrixRecord(
                    tensor=name,
                    rows=rows,
                    columns=columns,
                    sparsity=sparsity,
                    error=choice.outcome.error,
                    damping=choice.outcome.damping,
                    solver=choice.candidate.name,
                    held_out=choice.held_out,
                    runner_up=choice.runner_up,
                    grid=grid and asdict(grid),
                    bits=grid and grid.bits_per_weight(sparsity),
                    pattern=str(choice.candidate.pattern),
                )
            )
        refined = pruned.refined and (pruned.refined.before, pruned.refined.after)
        record = BlockRecord(
            planned.name, tuple(matrices), pruned.error, pruned.seconds, refined
        )
        return asdict(record)

    def _catch_up(self, planned: PlannedBlock) -> None:
        """Carry the streams through a block that an earlier run has pruned."""
        if self.paths is None:
            return
        names = self.plan.layout.shards[planned.shard]
        stored = self.scribe.read(planned.shard, names)
        with self.model.block(planned.index) as block:
            site = Site(block, planned, self.paths)
            if site.has_dense:
                site.dense_stream.advance(block, planned.index)
            install(site, self.model, stored)
            site.stream.advance(block, planned.index)


def _shortfall(choice: Choice, weight: Tensor) -> str | None:
    """Return what a stored matrix, [rows, columns], lacks of what was promised."""
    levels = choice.solution.levels
    if levels is not None and not torch.equal(
        levels.round(weight.float()), weight.float()
    ):
        return "it has values that are not on its grid"
    return choice.candidate.pattern.shortfall(weight)


class _Clock:
    """Tells how far a run is and, from the pace so far, how long it will take."""

    def __init__(self, progress: Callable[[Progress], None], blocks: int) -> None:
        self.progress = progress
        self.blocks = blocks
        self.begun: dict[int, float] = {}  # of the blocks pruned in this run

    def begin(self, block: int) -> None:
        self.begun[block] = time.monotonic()

    def report(self, block: int, phase: str) -> None:
        trim()  # a phase begins without what the one before has freed
        self.progress(Progress(block, self.blocks, phase, self._seconds_left(block)))

    def _seconds_left(self, block: int) -> float | None:
        done = len(self.begun) - 1
        if done < 1:
            return None
        pace = (self.begun[block] - next(iter(self.begun.values()))) / done
        spent = time.monotonic() - self.begun[block]
        return max(pace * (self.blocks - block) - spent, 0.0)
