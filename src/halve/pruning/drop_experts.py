"""Choose the experts that each block keeps, before anything in the model is pruned.

Block after block, experts are scored by several saliencies (`select.experts`). The
block is run on held-out windows with the experts that each of them keeps, its router
choosing among those, and what deviates least from the whole block is taken. Hidden
states then pass through the block as it will be, so that later blocks are judged on
what they will get.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halve.layout import PlannedBlock
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.observe.expert_outputs import ExpertSums, sum_expert_outputs
from halve.pruning.observe.input_groups import routed_groups
from halve.pruning.observe.output_error import relative_squares
from halve.pruning.observe.routing import keep_inputs
from halve.pruning.run import Run
from halve.pruning.select.experts import SALIENCIES, keep_best
from halve.records import ExpertsRecord, KeptExpertsRecord
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.fewer_experts import (
    ExpertSelection,
    Kept,
    with_fewer_experts,
)
from halve.runtime.stream import Stream


def choose_experts(
    run: Run, windows: Tensor, selection: ExpertSelection
) -> ExpertsRecord:
    """Score the experts of every block, and choose which to keep.

    Args:
        run: The run, whose model has all experts.
        windows: Calibration tokens, [samples, length]; the last ones are held out.
        selection: Sees the experts that are kept.

    Cost:
        Two passes of all windows through each block, and one of the held-out windows
        for each saliency; each reads the block from the files.
    """
    options, output = run.plan.options, run.output
    stream = Stream.start(
        run.model, windows, run.budget, output.folder, options.held_out, output.ranks
    )
    chooser = _Chooser(
        run, stream, selection, with_fewer_experts(run.model, selection, {})
    )
    modules: list[KeptExpertsRecord] = []
    for planned in run.plan.input_layout.blocks:
        run.progress.report(planned.index, "choosing experts")
        modules += chooser.choose(planned)
    fewer = selection.fewer
    return ExpertsRecord(fewer.total, fewer.kept, tuple(modules))


@dataclass(frozen=True)
class _Chooser:
    """Chooses the experts of one block after the other.

    Attributes:
        run: The run, whose model has all experts.
        stream: Hidden states that enter the next block.
        selection: Sees the experts that are kept.
        fewer: The model with as many experts as are kept, whichever.
    """

    run: Run
    stream: Stream
    selection: ExpertSelection
    fewer: BlockwiseModel

    def choose(self, planned: PlannedBlock) -> list[KeptExpertsRecord]:
        """Choose a block's experts, and carry the stream through what is left."""
        sums, targets = self._observe(planned)
        if not sums:
            with self.run.model.block(planned.index) as block:
                self.stream.advance(block, planned.index)
            return []
        ways = {name: self._kept(sums, name) for name in SALIENCIES}
        errors = {
            name: self._error(planned, kept, targets) for name, kept in ways.items()
        }
        best = min(errors, key=errors.__getitem__)
        with self._keeping(ways[best]).block(planned.index) as block:
            self.stream.advance(block, planned.index)
        return [
            KeptExpertsRecord(path, kept, best, errors)
            for path, kept in ways[best].items()
        ]

    @torch.no_grad()
    def _observe(
        self, planned: PlannedBlock
    ) -> tuple[dict[str, ExpertSums], list[Tensor]]:
        """Return sums of each module of experts, and outputs of held-out windows.

        Outputs are on the host: nothing of the block stays in memory.
        """
        sums: dict[str, ExpertSums] = {}
        groups = routed_groups(planned)
        if not groups:
            return sums, []
        with self.run.model.block(planned.index) as block:
            state = BlockState(block, planned, Streams(self.stream))
            for group in groups:
                folder = self.run.output.folder
                routed = keep_inputs(state, group, self.run.budget, folder)
                path = f"{planned.name}.{group.leader}"
                sums[path] = sum_expert_outputs(routed)
            return sums, list(self._outputs(state))

    def _outputs(self, state: BlockState) -> Iterable[Tensor]:
        for part in self._held_out():
            yield self.stream.run(state.block, state.planned.index, part).cpu()

    def _held_out(self) -> list[slice]:
        return [part for part in self.stream.batches() if self.stream.is_held_out(part)]

    def _kept(self, sums: dict[str, ExpertSums], name: str) -> Kept:
        fewer = self.selection.fewer
        return {
            path: keep_best(SALIENCIES[name](each), fewer.kept, fewer.groups)
            for path, each in sums.items()
        }

    def _keeping(self, kept: Kept) -> BlockwiseModel:
        """Return a model in which some blocks keep certain experts."""
        return replace(self.fewer, checkpoint=self.selection.keep(kept))

    @torch.no_grad()
    def _error(self, planned: PlannedBlock, kept: Kept, targets: list[Tensor]) -> float:
        """Return the mean over held-out tokens t of ||Y_t - Y'_t||^2 / ||Y_t||^2.

        Y are the outputs of the whole block, Y' of the block with fewer experts.
        """
        lost, tokens = 0.0, 0
        with self._keeping(kept).block(planned.index) as block:
            for part, target in zip(self._held_out(), targets, strict=True):
                outputs = self.stream.run(block, planned.index, part).cpu()
                each = relative_squares(outputs, target)
                lost += float(each.double().sum())
                tokens += each.numel()
        lost, tokens = self.stream.ranks.all_sum(lost, tokens)
        return lost / tokens
