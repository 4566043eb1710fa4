"""What is decided for the whole model, before its first block is pruned."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from halve.checkpoint import parse_note
from halve.grids import QuantScheme
from halve.patterns import Exact, Patterns, Unstructured
from halve.pruning.allocate.exact_counts import exact_patterns, zeros_by_saliency
from halve.pruning.allocate.mixes import MixSearch
from halve.pruning.allocate.search import AllocationSearch
from halve.pruning.allocate.trials import Trials
from halve.pruning.drop_experts import choose_experts
from halve.pruning.run import Run
from halve.pruning.select.candidates import candidates, pair_candidates
from halve.pruning.select.selection import OwnCandidates
from halve.records import AllocationRecord, ExpertsRecord, MixRecord, ZerosRecord
from halve.runtime.fewer_experts import select_experts, with_fewer_experts


@dataclass(frozen=True)
class Decisions:
    """What was decided; None where there was nothing to decide.

    Attributes:
        allocation: Sparsities of the blocks, by trials.
        zeros: Zeros of the matrices, by importance.
        mix: Pairs of sparsity and grid of the matrices.
        experts: Experts that each block keeps.
    """

    allocation: AllocationRecord | None = None
    zeros: ZerosRecord | None = None
    mix: MixRecord | None = None
    experts: ExpertsRecord | None = None


def drop_experts(run: Run, windows: Tensor | None) -> tuple[Run, ExpertsRecord | None]:
    """Return the run with a model of fewer experts, where some are to be dropped.

    What an earlier, interrupted run has chosen is taken.

    Cost:
        See `choose_experts`.
    """
    fraction = run.plan.options.expert_fraction
    if fraction is None:
        return run, None
    assert windows is not None, "experts are scored on text"
    model = run.model
    selection = select_experts(
        model.checkpoint, model.meta_model, fraction, run.trust_remote_code
    )
    note = run.output.decide_once(
        "experts", lambda: asdict(choose_experts(run, windows, selection))
    )
    record = parse_note(run.output.place, ExpertsRecord, note)
    fewer = with_fewer_experts(model, selection, record.by_module)
    return replace(run, model=fewer), record


def decide(run: Run, windows: Tensor | None) -> Decisions:
    """Return what this or an earlier, interrupted run has decided.

    Cost:
        See `AllocationSearch.choose` and `MixSearch.choose`.
    """
    options, output = run.plan.options, run.output
    if not options.trial_held_out:
        return Decisions()
    assert windows is not None, "trials need text"
    trials = Trials(
        plan=run.plan,
        model=run.model,
        windows=windows,
        memory_plan=run.memory_plan,
        folder=output.folder,
        report=run.progress.report,
        ranks=output.ranks,
    )
    if options.target_bits is None:
        search = AllocationSearch(trials)
        chosen = output.decide_once("allocation", lambda: asdict(search.choose()))
        return Decisions(parse_note(output.place, AllocationRecord, chosen))
    mixes = MixSearch(trials)
    chosen = output.decide_once("mix", lambda: asdict(mixes.choose()))
    return Decisions(mix=parse_note(output.place, MixRecord, chosen))


def allocate(run: Run, saliency: dict[str, Tensor]) -> ZerosRecord | None:
    """Return the zeros of each matrix as this or an earlier, interrupted run decided.

    Args:
        run: The run.
        saliency: As `zeros_by_saliency` takes it; empty where nothing was measured.

    Returns:
        None where matrices are not allocated by importance, or nothing was measured.
    """
    if not run.plan.options.allocates_by_importance or not saliency:
        return None
    ranks = run.output.ranks  # whose processors differ in last bits
    note = run.output.decide_once(
        "zeros",
        lambda: ranks.broadcast_object(
            lambda: asdict(ZerosRecord(zeros_by_saliency(run.plan, saliency)))
        ),
    )
    return parse_note(run.output.place, ZerosRecord, note)


def own_candidates(run: Run, decisions: Decisions) -> Iterator[OwnCandidates]:
    """Yield the ways to prune each block's matrices; empty where all are alike."""
    if decisions.mix is not None:
        yield from _of_mix(run, decisions.mix)
    elif decisions.allocation is not None:
        yield from _of_allocation(run, decisions.allocation)
    elif decisions.zeros is not None:
        yield from _of_zeros(run, decisions.zeros)
    else:
        yield from ({} for _ in run.plan.layout.blocks)


def _of_mix(run: Run, mix: MixRecord) -> Iterator[OwnCandidates]:
    options, layout = run.plan.options, run.plan.layout
    ways = [
        pair_candidates(
            options, (Unstructured(p.sparsity), QuantScheme(**p.grid)), layout.dtype
        )
        for p in mix.pairs
    ]
    indices = iter(mix.matrices)
    for block in layout.blocks:
        yield {m.name: ways[next(indices)] for m in block.matrices}


def _of_allocation(run: Run, allocation: AllocationRecord) -> Iterator[OwnCandidates]:
    """Yield the candidates, each with the exact number of zeros of a matrix."""
    for patterns in exact_patterns(run.plan, allocation.sparsities):
        yield _with_patterns(run, patterns)


def _of_zeros(run: Run, record: ZerosRecord) -> Iterator[OwnCandidates]:
    """As `_of_allocation`, for matrices of which no rule speaks."""
    for block in run.plan.layout.blocks:
        yield _with_patterns(
            run,
            {
                m.name: Exact(record.zeros[m.name], m.elements)
                for m in block.matrices
                if m.name in record.zeros
            },
        )


def _with_patterns(run: Run, patterns: Patterns) -> OwnCandidates:
    every = candidates(run.plan.options, run.plan.layout.dtype)
    return {
        tensor: tuple(replace(c, pattern=pattern) for c in every)
        for tensor, pattern in patterns.items()
    }
