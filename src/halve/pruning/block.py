"""One block: what its matrices see, each matrix in turn, the block as a whole."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halve.errors import NumericalError
from halve.finite import is_finite
from halve.patterns import Pattern
from halve.plan import PlannedBlock, PlannedMatrix
from halve.pruning.budget import Patterns
from halve.pruning.choice import Candidate, Choice, Contest
from halve.pruning.evidence import Evidence, collect, sum_up
from halve.pruning.groups import Group, stages
from halve.pruning.kept import Kept, is_wide
from halve.pruning.reference import record_dense
from halve.pruning.refine import Refined, Refining, refine
from halve.pruning.shares import Owners, bring_together, deal_out, share_choice
from halve.pruning.site import Paths, Site, weight_path
from halve.pruning.trim import trim
from halve.runtime.streamed import StreamedModel
from halve.solvers.correction import Correction
from halve.statistics import Gram, Nothing, Statistic


@dataclass(frozen=True)
class Task:
    """What is done to every block.

    Attributes:
        candidates: Ways to prune a matrix; of several the best on held-out inputs wins.
        correction: Damping of error-corrected targets; None to prune all matrices of a
            block at once, for the targets of the dense block on the same inputs.
        refining: How the block is tuned afterwards, if it is.
        budget: Bytes of the dense model's inputs that may live in memory.
        folder: Where a mapped file lies past that.
        report: Told of each phase.
        patterns: What single matrices shall obey, in place of the candidates' own.
        aside: As of `Room`.
    """

    candidates: tuple[Candidate, ...]
    correction: float | None
    refining: Refining | None
    budget: int
    folder: Path | None
    report: Callable[[str], None]
    patterns: Patterns = field(default_factory=dict)
    aside: bool = False

    @property
    def statistic(self) -> type[Statistic]:
        """What the solvers need to know of the inputs."""
        if self.correction is not None or len(self.candidates) > 1:
            return Gram
        return next(iter(self.candidates)).solver.statistic


@dataclass(frozen=True)
class Pruned:
    """A block after pruning.

    Attributes:
        tensors: What has changed in it, as it will be stored.
        choices: For each matrix the solution that was taken.
        error: ||Y - Y'|| / ||Y|| of the outputs of the first batch; None without text.
        refined: What refining brought, if it was asked for.
        seconds: Wall time.
    """

    tensors: dict[str, Tensor]
    choices: dict[str, Choice]
    error: float | None
    refined: Refined | None
    seconds: float


@torch.no_grad()
def prune_block(
    model: StreamedModel, paths: Paths | None, planned: PlannedBlock, task: Task
) -> Pruned:
    """Prune a block and carry all hidden states through it.

    Args:
        model: Holds the dense weights.
        paths: Hidden states that enter the block; afterwards those that leave it. None
            where the solver needs no text.
        planned: The block.
        task: What to do to it.

    Raises:
        NumericalError: Weights, activations or solutions that are not finite.
    """
    begun = time.perf_counter()
    with model.block(planned.index) as block:
        site = Site(block, planned, paths)
        before = site.first_outputs()
        choices: dict[str, Choice] = {}
        for stage in _observe(site, task):
            choices |= _solve_stage(site, model, stage, task)
        refined = _refine(site, model, task)
        task.report("propagating")
        error = site.advance(before)
        tensors = dict(_stored(site, model))
    return Pruned(tensors, choices, error, refined, time.perf_counter() - begun)


def _observe(site: Site, task: Task) -> Iterator[list[Evidence]]:
    """Yield groups that are pruned together, with what is known of their inputs.

    Where targets are corrected that is only gathered once the stages before it are
    pruned, and so by a pass for each; else by one pass of the dense block.
    """
    if site.paths is None:
        nothing = Nothing(0, torch.device("cpu"))
        task.report("solving")
        for matrix in site.planned.matrices:
            yield [Evidence(Group((matrix,)), nothing, None)]
        return
    groups = site.groups()
    dense = _dense_inputs(site, groups, task)
    if dense is None:
        yield from _all_at_once(site, groups, task)
        return
    for stage in stages(groups, site.width):
        task.report("collecting")
        found = collect(site, stage, task.statistic, dense)
        task.report("solving")
        yield found


def _all_at_once(
    site: Site, groups: list[Group], task: Task
) -> Iterator[list[Evidence]]:
    """Yield all groups; by themselves those whose inputs are summed later."""
    wide = [g for g in groups if task.aside and is_wide(g.columns, site.width)]
    aside = Kept.room(site.stream, site.planned.name, wide, 0, task.folder)
    task.report("collecting")
    found = collect(site, groups, task.statistic, aside=aside)
    task.report("solving")
    yield found
    for group in wide:
        task.report("summing")
        found = [sum_up(site, group, task.statistic, aside)]
        task.report("solving")
        yield found


def _dense_inputs(site: Site, groups: list[Group], task: Task) -> Kept | None:
    """Carry the dense stream on, if there is one; keep what corrections need."""
    if not site.has_dense:
        return None
    wanted = groups if task.correction is not None else []
    kept = record_dense(site, wanted, task.budget, task.folder)
    return kept if wanted else None


def _solve_stage(
    site: Site, model: StreamedModel, stage: list[Evidence], task: Task
) -> dict[str, Choice]:
    """Prune groups, each matrix where it is dealt to; afterwards all ranks have all."""
    matrices = [m for evidence in stage for m in evidence.group.matrices]
    owners = deal_out(stage, site.ranks)
    stage = bring_together(stage, owners, site.ranks)
    own: dict[str, Choice] = {}
    while stage:  # what a group's solutions needed is gone when the next is begun
        own |= _solve_group(site, model, stage.pop(0), task, owners)
        trim()
    choices: dict[str, Choice] = {}
    for planned in matrices:
        dtype, owner = _dtype(model, planned), owners[planned.tensor]
        choice = share_choice(own.get(planned.tensor), dtype, owner, site.ranks)
        if owner != site.ranks.rank:
            choice = _put(site, model, planned, choice)
        choices[planned.tensor] = choice
    return choices


def _solve_group(
    site: Site, model: StreamedModel, evidence: Evidence, task: Task, owners: Owners
) -> dict[str, Choice]:
    """Prune this rank's matrices of a group, and put them into the block so."""
    name = f"{site.planned.name}.{evidence.group.leader}"
    try:
        correction = _correction(evidence, task)
        contest = Contest.prepare(task.candidates, evidence)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error.problem}", error.remedy) from error
    choices: dict[str, Choice] = {}
    for index, planned in enumerate(evidence.group.matrices):
        if owners[planned.tensor] == site.ranks.rank:
            target = partial(correction.target, index) if correction else None
            pattern = task.patterns.get(planned.tensor)
            choice = _solve(site.weight(planned), target, contest, pattern)
            choices[planned.tensor] = _put(site, model, planned, choice)
            del choice  # in float32, while the next one is looked for
    return choices


def _solve(
    stored: Tensor,
    target: Callable[[Tensor], Tensor] | None,
    contest: Contest,
    pattern: Pattern | None,
) -> Choice:
    """Prune one matrix, given as it lies in the block."""
    return contest.solve(stored, target(stored) if target else stored, pattern)


def _correction(evidence: Evidence, task: Task) -> Correction | None:
    if evidence.drift is None or task.correction is None:
        return None
    assert isinstance(evidence.statistic, Gram)
    return Correction.of(evidence.statistic, evidence.drift, task.correction)


def _put(
    site: Site, model: StreamedModel, planned: PlannedMatrix, choice: Choice
) -> Choice:
    """Put a matrix into the block, rounded to what will be stored.

    Returns:
        The choice, whose weights are those in the block: there is no second copy.
    """
    dtype, path = _dtype(model, planned), weight_path(planned)
    own, solution = planned.matrix.as_rows, choice.solution
    site.release(path)  # before there is another: matrices are dear
    # In one piece at once, since copies of such a matrix are dear.
    rounded = own(solution.weight).to(dtype, memory_format=torch.contiguous_format)
    rounded = rounded.contiguous()  # where it had that dtype
    if not is_finite(rounded):
        raise NumericalError(
            f"The solution for {planned.tensor} is not finite in {dtype}.",
            "Raise --damping, or calibrate on other text.",
        )
    site.exchange(path, rounded)
    # Where none is pruned, a weight that was rounded to 0 may come back.
    site.solved[path] = choice.candidate.pattern.sparsity > 0
    if (levels := solution.levels) is not None:
        site.levels[path] = lambda values: own(levels.round(own(values))).contiguous()
    return replace(choice, solution=replace(solution, weight=site.weight(planned)))


def _dtype(model: StreamedModel, planned: PlannedMatrix) -> torch.dtype:
    return model.checkpoint.tensors[planned.tensor].dtype


def _refine(site: Site, model: StreamedModel, task: Task) -> Refined | None:
    if task.refining is None:
        return None
    task.report("refining")
    return refine(site, model.own_dtypes(site.planned.name), task.refining)


def _stored(site: Site, model: StreamedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what has changed in a block: tensors of the checkpoint, in its dtype."""
    for path in sorted(site.changed):
        tensor = model.tensors[f"{site.planned.name}.{path}"]
        dtype = model.checkpoint.tensors[tensor].dtype
        yield tensor, site.block.get_parameter(path).data.to(dtype).cpu()


def install(site: Site, model: StreamedModel, stored: dict[str, Tensor]) -> None:
    """Put what an earlier run has stored into a block that is dense."""
    for path, parameter in site.block.named_parameters():
        tensor = model.tensors[f"{site.planned.name}.{path}"]
        if tensor in stored:  # what other blocks share lies in the shard of the first
            site.exchange(path, stored[tensor].to(parameter.device))
