"""The main job, from a model's name to a whole new folder."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.calibration import (
    check_vocabulary,
    draw_windows,
    load_corpus,
    load_encoder,
)
from halve.checkpoint import (
    Workspace,
    check_space,
    is_finished,
    output_path,
    read_record,
    resolve_model,
)
from halve.distributed import SINGLE_PROCESS, Ranks
from halve.errors import DistributedError
from halve.formats import quantization_config
from halve.options import PruneOptions, RunOptions
from halve.plan import Plan, make_plan
from halve.pruning.distributed.output import RankZeroOutput, open_output
from halve.pruning.loop import Run
from halve.pruning.select.candidates import candidates
from halve.pruning.select.selection import combined_needs
from halve.records import (
    AllocationRecord,
    BlockRecord,
    Progress,
    PruneRecord,
    now,
    versions,
)
from halve.runtime.blockwise_model import BlockwiseModel, choose_device
from halve.runtime.generation import sample_windows
from halve.runtime.oom_backoff import with_smaller_batches

# What the ledger calls the size of batches, where it is not the usual one.
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
        model: A folder or a name on the hub.
        out: The new folder; its parent is made where it is not there.
        options: What to do.
        run_options: How to go about it.
        ranks: The processes that share the work. Their number changes the windows
            that a step of tuning sees, and nothing else.

    Returns:
        What was done, as it stands in `OUT/halve.json`. If that folder was made by the
        same arguments before, its record, and nothing is touched.

    Raises:
        HalveError: See its children. `out` does not exist then; what was done so far
            lies in `OUT.partial`, where the same call goes on.
    """
    started = time.monotonic()
    source = resolve_model(model)
    out = output_path(out, source)
    plan = make_plan(source, options, run_options.trust_remote_code)
    _check_ranks(plan, ranks)
    windows = ranks.broadcast_object(
        lambda: _windows(plan, run_options.trust_remote_code)
    )
    identity = _identity(plan, windows)
    if ranks.broadcast_object(lambda: is_finished(out, identity)):
        depth = len(plan.layout.blocks)
        phase = "all were finished before, nothing was done"
        run_options.progress(Progress(depth - 1, depth, phase))
        return ranks.broadcast_object(lambda: read_record(out, PruneRecord.from_json))
    ranks.broadcast_object(lambda: check_space(out, plan.layout.output_bytes))
    with open_output(out, identity, ranks) as output:
        if output.is_complete:
            return ranks.broadcast_object(lambda: _publish(output.workspace, out))
        blocks, allocation = _run(plan, run_options, output, windows)

        def conclude() -> PruneRecord:
            assert output.workspace is not None, "rank 0 has the workspace"
            packed = quantization_config() if options.packed else None
            files = output.workspace.add_side_files(source, packed)
            record = PruneRecord(
                versions=versions(),
                identity=identity,
                blocks=blocks,
                shards=_shards(plan, output.workspace),
                left_dense=plan.layout.left_dense,
                seconds=time.monotonic() - started,
                finished=now(),
                allocation=allocation,
                files=files,
            )
            output.workspace.finish(record.to_json())
            return record

        return ranks.broadcast_object(conclude)


def _publish(workspace: Workspace | None, out: Path) -> PruneRecord:
    assert workspace is not None, "rank 0 has the workspace"
    workspace.publish()
    return read_record(out, PruneRecord.from_json)


def _check_ranks(plan: Plan, ranks: Ranks) -> None:
    """Raise RanksError where processes see different models, or have nothing to do."""
    seen = {file: text.partition(",")[0] for file, text in plan.layout.sources.items()}
    theirs = ranks.broadcast_object(lambda: seen)
    if seen != theirs:
        files = sorted(f for f in {*seen, *theirs} if seen.get(f) != theirs.get(f))
        raise DistributedError(
            f"Process {ranks.rank} finds another {files[0]} in {plan.model} than "
            "process 0 does.",
            "Give every machine the same files of the model.",
        )
    options = plan.options
    fitted = options.samples - max(options.held_out, options.allocation_held_out)
    least = min(fitted, options.allocation_held_out or fitted)
    if ranks.size > least:
        raise DistributedError(
            f"{ranks.size} processes were to share {least} windows.",
            "Start fewer processes, or pass more --samples.",
        )


def _run(
    plan: Plan, run_options: RunOptions, output: RankZeroOutput, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], AllocationRecord | None]:
    """Do what is left of a run, with smaller batches where memory is exhausted.

    How small stands in the ledger, so that a run that goes on has the same. Where
    several processes share the work, all would have to halve at once: there it fails.
    """
    ranks, length = output.ranks, plan.options.seq_len
    assert length is not None
    device = ranks.device(plan.options.device)
    model = BlockwiseModel.open(plan.model, device, run_options.trust_remote_code)
    first = model.batch_tokens

    def attempt(
        model: BlockwiseModel,
    ) -> tuple[tuple[BlockRecord, ...], AllocationRecord | None]:
        if model.batch_tokens < first and output.workspace is not None:
            output.workspace.decide(_BATCH, {"tokens": model.batch_tokens})
        run = Run(plan, run_options, output, model, windows)
        return tuple(run.finish()), run.allocation

    model = replace(model, batch_tokens=output.decision(_BATCH).get("tokens", first))
    if ranks.size > 1:
        return attempt(model)
    return with_smaller_batches(model, length, attempt)


def _windows(plan: Plan, trust_remote_code: bool) -> Tensor | None:
    """Return calibration windows, None where the solver needs none."""
    options = plan.options
    ways = candidates(options, plan.layout.dtype)
    asks = options.has_dense or options.held_out or options.allocation_held_out
    if not combined_needs(ways) and not asks:
        return None
    assert options.seq_len is not None
    size = (options.samples, options.seq_len)
    if options.calibration == "self":
        return sample_windows(plan.model, *size, options.seed, trust_remote_code)
    corpus = load_corpus(options.calibration, "calibration")
    encode = load_encoder(plan.model, trust_remote_code)
    windows = draw_windows(corpus, encode, *size, options.seed)
    check_vocabulary(windows, plan.vocabulary)
    return windows


def _identity(plan: Plan, windows: Tensor | None) -> dict[str, Any]:
    digest = hashlib.sha256(windows.numpy().tobytes()) if windows is not None else None
    return plan.identity() | {
        "device": choose_device(plan.options.device).type,
        "calibration_sha256": digest and digest.hexdigest(),
    }


def _shards(plan: Plan, workspace: Workspace) -> dict[str, str]:
    return {file: workspace.committed[file].sha256 for file in plan.layout.shards}
