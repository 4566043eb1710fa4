"""Prune a model, from its name to a finished output folder.

Decides what to do (plan, calibration windows, identity), runs the loop over the blocks
in `OUT.partial`, and publishes the folder with its record.
"""

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.checkpoint import (
    Workspace,
    check_space,
    is_finished,
    output_path,
    read_record,
    resolve_model,
)
from halve.devices import choose_device
from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import DistributedError, HalveError, HalveWarning
from halve.formats import quantization_config
from halve.options import PruneOptions, RunOptions
from halve.pruning.decisions import Decisions
from halve.pruning.distributed.output import RankZeroOutput, open_output
from halve.pruning.loop import prune_blocks
from halve.pruning.memory.forecast import forecast_host
from halve.pruning.memory.limit import agree, plan_memory
from halve.pruning.plan import Plan, make_plan
from halve.pruning.progress import ProgressReporter
from halve.pruning.quantize_head import head_records
from halve.pruning.run import Run
from halve.pruning.windows import CalibrationWindows, calibration_windows
from halve.records import (
    BlockRecord,
    ModelRecord,
    Progress,
    PruneRecord,
    now,
    versions,
)
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.machine import this_machine
from halve.runtime.oom_backoff import with_smaller_batches
from halve.system import own_peak, peak_memory

# Name of the ledger's entry for the batch size, where it is not the default one.
_BATCH = "batch"


def prune_model(
    model: str | Path,
    out: str | Path,
    options: PruneOptions,
    run_options: RunOptions,
    ranks: Ranks = SINGLE_PROCESS,
) -> PruneRecord:
    """Prune a model into a new folder.

    Args:
        model: A folder or the name of a repository on the Hub.
        out: The new folder. Its parent is created if necessary.
        options: What to do; determines the bytes of the output.
        run_options: How to do it; does not change the output.
        ranks: The processes that work together. Their number only changes which
            windows a step of block reconstruction sees.

    Returns:
        The record of the run, as written to `OUT/halve.json`. If the same arguments
        produced that folder before, its record; nothing is changed then.

    Raises:
        HalveError: See its children. `out` does not exist then. What has been done is
            in `OUT.partial`; the same call resumes from there.
    """
    started, peak_before = time.monotonic(), peak_memory()
    source = resolve_model(model)
    out = output_path(out, source)
    plan = make_plan(source, options, run_options.trust_remote_code)
    _check_consent(plan, run_options)
    _check_ranks(plan, ranks)
    windows = ranks.broadcast_object(
        lambda: calibration_windows(plan, run_options.trust_remote_code)
    )
    identity = _identity(plan, windows)
    if ranks.broadcast_object(lambda: is_finished(out, identity)):
        depth = len(plan.layout.blocks)
        phase = "already finished, nothing to do"
        run_options.progress(Progress(depth - 1, depth, phase))
        return ranks.broadcast_object(lambda: read_record(out, PruneRecord.from_json))
    ranks.broadcast_object(lambda: check_space(out, plan.layout.disk_bytes))
    with open_output(out, identity, plan.layout.files, ranks) as output:
        if output.is_complete:
            return ranks.broadcast_object(lambda: _publish(output.workspace, out))
        blocks, decisions, foreseen = _run(plan, run_options, output, windows.ids)
        _warn_of_unseen_experts(blocks)

        def finish() -> PruneRecord:
            assert output.workspace is not None, "rank 0 has the workspace"
            formats = output.workspace.formats
            packed = quantization_config(formats) if options.packed else None
            changes = plan.dropping and plan.dropping.changes
            files = output.workspace.add_side_files(source, packed, changes)
            record = PruneRecord(
                versions=versions(),
                identity=identity,
                blocks=blocks,
                shards=_digests(plan, output.workspace),
                left_dense=plan.layout.left_dense,
                seconds=time.monotonic() - started,
                finished=now(),
                allocation=decisions.allocation,
                mix=decisions.mix,
                experts=decisions.experts,
                files=files,
                heads=head_records(plan, output.workspace),
                model=_model_record(model, plan),
                machine=this_machine(choose_device(ranks.device(plan.options.device))),
                bytes_peak=own_peak(peak_before),
                bytes_foreseen=foreseen,
            )
            output.workspace.finish(record.to_json())
            return record

        return ranks.broadcast_object(finish)


def _model_record(name: str | Path, plan: Plan) -> ModelRecord:
    folder = plan.model
    # The Hub's cache has a folder for each commit.
    revision = folder.name if folder.parent.name == "snapshots" else ""
    infos = plan.input_layout.tensors.values()
    return ModelRecord(
        str(name),
        revision,
        plan.model_type,
        parameters=sum(info.elements for info in infos),
        bytes=sum(info.nbytes for info in infos),
    )


def _warn_of_unseen_experts(blocks: tuple[BlockRecord, ...]) -> None:
    """Warn if no token of the calibration text was sent to some expert.

    Warns:
        HalveWarning: As said; such an expert is fitted to the tokens of all others.
    """
    unseen = [
        (f"{block.name}.{path}", number)
        for block in blocks
        for path, tokens in block.expert_tokens.items()
        for number, count in enumerate(tokens)
        if not count
    ]
    if unseen:
        path, number = unseen[0]
        warnings.warn(
            f"The calibration text sent no token to {len(unseen)} experts (expert "
            f"{number} of {path}, for one), which are fitted to the tokens of all "
            "others. Calibrate on more samples, or on text like that of later use.",
            HalveWarning,
            stacklevel=3,
        )


def _publish(workspace: Workspace | None, out: Path) -> PruneRecord:
    """Rename a complete workspace that an earlier run could not rename any more."""
    assert workspace is not None, "rank 0 has the workspace"
    workspace.publish()
    return read_record(out, PruneRecord.from_json)


def _check_consent(plan: Plan, run_options: RunOptions) -> None:
    """Raise HalveError if more than half of the experts would be dropped unasked."""
    dropping = plan.dropping
    if dropping is None or 2 * dropping.kept >= dropping.total or run_options.yes:
        return
    raise HalveError(
        f"{dropping.total - dropping.kept} of {dropping.total} experts of each block "
        "would be dropped, more than half, of which few models stay usable.",
        "Keep 50% or more (--experts), or set yes (--yes).",
    )


def _check_ranks(plan: Plan, ranks: Ranks) -> None:
    """Check that all ranks see the same model and that each gets a window.

    Raises:
        DistributedError: One of them does not hold.
    """
    files = {file: text.partition(",")[0] for file, text in plan.layout.sources.items()}
    reference = ranks.broadcast_object(lambda: files)
    if files != reference:
        names = {*files, *reference}
        differing = sorted(n for n in names if files.get(n) != reference.get(n))
        raise DistributedError(
            f"{differing[0]} in {plan.model} differs between process {ranks.rank} and "
            "process 0.",
            "Give every machine the same files of the model.",
        )
    options = plan.options
    fitted = options.samples - max(options.held_out, options.trial_held_out)
    windows = min(fitted, options.trial_held_out or fitted)
    if ranks.size > windows:
        raise DistributedError(
            f"{ranks.size} processes were started for {windows} windows.",
            "Start fewer processes, or pass more --samples.",
        )


def _run(
    plan: Plan, run_options: RunOptions, output: RankZeroOutput, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], Decisions, int]:
    """Run the loop over the blocks, with smaller batches where memory is exhausted.

    The reduced batch size goes into the ledger, so that a resumed run uses it too and
    ends in the same bytes. With several processes all of them would have to reduce it
    at the same time; there the error is raised.

    Returns:
        The blocks, how the sparsity was distributed, and the peak of memory that was
        predicted.
    """
    ranks, length = output.ranks, plan.options.seq_len
    assert length is not None
    device = ranks.device(plan.options.device)
    model = BlockwiseModel.open(plan.model, device, run_options.trust_remote_code)
    default = model.batch_tokens

    def attempt(
        model: BlockwiseModel,
    ) -> tuple[tuple[BlockRecord, ...], Decisions, int]:
        if model.batch_tokens < default and output.workspace is not None:
            output.workspace.decide(_BATCH, {"tokens": model.batch_tokens})
        limits = (run_options.memory, run_options.activation_memory)
        memory_plan = agree(plan_memory(plan, *limits, ranks.local_size), ranks)
        places = memory_plan.activations, memory_plan.deferred, memory_plan.spilled
        if memory_plan.spilled:
            model = replace(model, spill=output.folder)
        foreseen = forecast_host(plan, *places).peak
        depth = len(plan.layout.blocks)
        progress = ProgressReporter(run_options.progress, depth)
        overlaps = run_options.memory is None
        trusted = run_options.trust_remote_code
        run = Run(plan, model, output, memory_plan, progress, overlaps, trusted)
        return *prune_blocks(run, windows), foreseen

    model = replace(
        model,
        batch_tokens=output.decision(_BATCH).get("tokens", default),
        matmul_precision=plan.options.matmul_precision,
    )
    if ranks.size > 1:
        return attempt(model)
    return with_smaller_batches(model, length, attempt)


def _identity(plan: Plan, windows: CalibrationWindows) -> dict[str, Any]:
    """Return what two runs must have in common to produce the same bytes."""
    device = choose_device(plan.options.device).type
    return plan.identity() | {"device": device} | windows.identity()


def _digests(plan: Plan, workspace: Workspace) -> dict[str, str]:
    """Return the SHA-256 of every file of weights."""
    return {file: workspace.digests[file] for file in plan.layout.files}
