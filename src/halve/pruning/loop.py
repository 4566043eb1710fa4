"""The loop over a plan's shards, each committed before the next is begun."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, Workspace, parse_note
from halve.errors import TargetMissedError
from halve.formats import store
from halve.layout import PlannedBlock
from halve.options import RunOptions
from halve.patterns import Patterns
from halve.pruning.allocate.exact_counts import check_total, exact_patterns
from halve.pruning.allocate.search import AllocationSearch
from halve.pruning.distributed.output import RankZeroOutput
from halve.pruning.memory.limit import plan_memory
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.plan import Plan
from halve.pruning.prune_block import BlockOptions, PrunedBlock, install, prune_block
from halve.pruning.select.candidates import candidates
from halve.pruning.select.selection import Selected
from halve.pruning.tune.block_reconstruction import TuneOptions
from halve.records import (
    AllocationRecord,
    BlockRecord,
    MatrixRecord,
    Progress,
)
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.malloc_trim import malloc_trim
from halve.runtime.stream import Stream


class Run:
    """A plan in execution, with what it carries from one block to the next."""

    def __init__(
        self,
        plan: Plan,
        run_options: RunOptions,
        output: RankZeroOutput,
        model: BlockwiseModel,
        windows: Tensor | None,
    ) -> None:
        self.plan = plan
        self.output = output
        self.ranks = output.ranks
        self.candidates = candidates(plan.options, plan.layout.dtype)
        self.clock = _Clock(run_options.progress, len(plan.layout.blocks))
        self.model = model
        limits = (run_options.memory, run_options.activation_memory)
        self.memory_plan = plan_memory(plan, *limits, self.ranks.local_size)
        self.allocation = self._allocate(windows)
        self.patterns = self._patterns()
        self.budget = self.memory_plan.activations // plan.options.activation_parts
        self.streams = None if windows is None else self._start(windows)

    def _allocate(self, windows: Tensor | None) -> AllocationRecord | None:
        """Return what an earlier run chose, or choose; None where all are alike."""
        if not self.plan.options.allocation_held_out:
            return None
        assert windows is not None, "there is no text to judge allocations by"
        trials = AllocationSearch(
            plan=self.plan,
            model=self.model,
            windows=windows,
            memory_plan=self.memory_plan,
            folder=self.output.folder,
            report=self.clock.report,
            ranks=self.ranks,
        )
        chosen = self.output.decide_once("allocation", lambda: asdict(trials.choose()))
        return parse_note(self.output.place, AllocationRecord, chosen)

    def _patterns(self) -> list[Patterns]:
        """Return for each block what its matrices shall obey, if that is not alike."""
        if self.allocation is None:
            return [{} for _ in self.plan.layout.blocks]
        return exact_patterns(self.plan, self.allocation.sparsities)

    def _start(self, windows: Tensor) -> Streams:
        options, where = self.plan.options, (self.budget, self.output.folder)
        held_out = options.held_out
        stream = Stream.start(self.model, windows, *where, held_out, self.ranks)
        return Streams(stream, stream.fork(*where) if options.has_dense else None)

    def finish(self) -> list[BlockRecord]:
        """Do every shard that is not done.

        Returns:
            What became of the blocks; nothing on ranks that do not write.
        """
        if self.output.workspace is not None:
            self._copy_rest(self.output.workspace)
        for planned in self.plan.layout.blocks:
            self._block(planned)
        if self.output.workspace is None:
            return []
        committed, blocks = self.output.workspace.committed, self.plan.layout.blocks
        records = [
            parse_note(self.output.place, BlockRecord, committed[block.shard].note)
            for block in blocks
        ]
        if self.allocation is not None:
            check_total(self.plan, records)
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
        if planned.shard in self.output.done:
            self.clock.report(planned.index, "catching up")
            self._catch_up(planned)
        else:
            self._prune(planned)

    def _prune(self, planned: PlannedBlock) -> None:
        self.clock.begin(planned.index)
        options = self.plan.options
        options = BlockOptions(
            candidates=self.candidates,
            correction=options.damping if options.corrects else None,
            refining=TuneOptions(options.epochs, options.seed)
            if options.refine
            else None,
            budget=self.budget,
            folder=self.output.folder,
            report=lambda phase: self.clock.report(planned.index, phase),
            patterns=self.patterns[planned.index],
            deferred=self.memory_plan.deferred,
        )
        pruned = prune_block(self.model, self.streams, planned, options)
        options.report("writing")
        if self.output.workspace is not None:
            self._write(self.output.workspace, planned, pruned)

    def _write(
        self, workspace: Workspace, planned: PlannedBlock, pruned: PrunedBlock
    ) -> None:
        names = self.plan.layout.shards[planned.shard]
        others = [name for name in names if name not in pruned.tensors]
        tensors = self.model.checkpoint.read(others) | self._stored(planned, pruned)
        workspace.commit(
            planned.shard, tensors, lambda path: self._verify(planned, pruned, path)
        )

    def _stored(self, planned: PlannedBlock, pruned: PrunedBlock) -> dict[str, Tensor]:
        """Return pruned matrices as the file will hold them."""
        tensors = dict(pruned.tensors)
        if self.plan.options.packed:
            for matrix in planned.matrices:
                weight = tensors.pop(matrix.tensor)
                tensors |= store(matrix.tensor, weight, matrix.matrix.transposed)
        return tensors

    def _verify(
        self, planned: PlannedBlock, pruned: PrunedBlock, path: Path
    ) -> dict[str, Any]:
        """Read the file again; return the block's record, or refuse what is in it."""
        written = Checkpoint.of_files([path]).read(pruned.selected_by_tensor)
        matrices: list[MatrixRecord] = []
        for matrix in planned.matrices:
            name, (rows, columns) = matrix.tensor, matrix.matrix.shape
            weight = matrix.matrix.as_rows(written[name])
            selected = pruned.selected_by_tensor[name]
            if (shortfall := _shortfall(selected, weight)) is not None:
                raise TargetMissedError(
                    f"{name} in {path} is not what it should be: {shortfall}.",
                    "Report this as a defect of Halve, with the model's name.",
                )
            sparsity = float((weight == 0).double().mean())
            grid = selected.candidate.grid
            matrices.append(
                MatrixRecord(
                    tensor=name,
                    rows=rows,
                    columns=columns,
                    sparsity=sparsity,
                    error=selected.outcome.error,
                    damping=selected.outcome.damping,
                    solver=selected.candidate.name,
                    held_out=selected.held_out,
                    runner_up=selected.runner_up,
                    grid=grid and asdict(grid),
                    bits=grid and grid.bits_per_weight(sparsity),
                    pattern=str(selected.candidate.pattern),
                )
            )
        refined = pruned.refined and (pruned.refined.before, pruned.refined.after)
        record = BlockRecord(
            planned.name, tuple(matrices), pruned.error, pruned.seconds, refined
        )
        return asdict(record)

    def _catch_up(self, planned: PlannedBlock) -> None:
        """Carry the streams through a block that an earlier run has pruned."""
        if self.streams is None:
            return
        names = self.plan.layout.shards[planned.shard]
        stored = self.output.read(planned.shard, names)
        with self.model.block(planned.index) as block:
            state = BlockState(block, planned, self.streams)
            if state.has_dense:
                state.dense_stream.advance(block, planned.index)
            install(state, self.model, stored)
            state.stream.advance(block, planned.index)


def _shortfall(selected: Selected, weight: Tensor) -> str | None:
    """Return what a stored matrix, [rows, columns], lacks of what was promised."""
    quant_params = selected.solution.quant_params
    if quant_params is not None and not torch.equal(
        quant_params.fake_quantize(weight.float()), weight.float()
    ):
        return "it has values that are not on its grid"
    return selected.candidate.pattern.shortfall(weight)


class _Clock:
    """Tells how far a run is and, from the pace so far, how long it will take."""

    def __init__(self, progress: Callable[[Progress], None], blocks: int) -> None:
        self.progress = progress
        self.blocks = blocks
        self.started: dict[int, float] = {}  # of the blocks pruned in this run

    def begin(self, block: int) -> None:
        self.started[block] = time.monotonic()

    def report(self, block: int, phase: str) -> None:
        malloc_trim()  # a phase begins without what the one before has freed
        self.progress(Progress(block, self.blocks, phase, self._seconds_left(block)))

    def _seconds_left(self, block: int) -> float | None:
        done = len(self.started) - 1
        if done < 1:
            return None
        pace = (self.started[block] - next(iter(self.started.values()))) / done
        spent = time.monotonic() - self.started[block]
        return max(pace * (self.blocks - block) - spent, 0.0)
