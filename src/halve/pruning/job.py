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
    locate,
    output_path,
    read_record,
)
from halve.distributed import Ranks
from halve.errors import RanksError
from halve.formats import quantization_config
from halve.plan import Plan, make_plan
from halve.pruning.candidates import candidates
from halve.pruning.run import Execution, Run
from halve.pruning.scribe import Scribe, open_scribe
from halve.records import (
    AllocationRecord,
    BlockRecord,
    Progress,
    PruneRecord,
    now,
    versions,
)
from halve.runtime.generation import sample_windows
from halve.runtime.halving import with_smaller_batches
from halve.runtime.streamed import StreamedModel, choose_device
from halve.settings import Settings
from halve.statistics import Nothing

# What the ledger calls the size of batches, where it is not the usual one.
_BATCH = "batch"


def prune_model(
    model: str | Path, out: str | Path, settings: Settings, execution: Execution
) -> PruneRecord:
    """Prune a model into a new folder.

    Args:
        model: A folder or a name on the hub.
        out: The new folder; its parent is made where it is not there.
        settings: What to do.
        execution: How to go about it.

    Returns:
        What was done, as it stands in `OUT/halve.json`. If that folder was made by the
        same arguments before, its record, and nothing is touched.

    Raises:
        HalveError: See its children. `out` does not exist then; what was done so far
            lies in `OUT.partial`, where the same call goes on.
    """
    begun = time.monotonic()
    ranks = execution.ranks
    source = locate(model)
    out = output_path(out, source)
    plan = make_plan(source, settings, execution.trust_remote_code)
    _check_ranks(plan, ranks)
    windows = ranks.share(lambda: _windows(plan, execution.trust_remote_code))
    identity = _identity(plan, windows)
    if ranks.share(lambda: is_finished(out, identity)):
        depth = len(plan.layout.blocks)
        phase = "all were finished before, nothing was done"
        execution.progress(Progress(depth - 1, depth, phase))
        return ranks.share(lambda: read_record(out, PruneRecord.from_json))
    ranks.share(lambda: check_space(out, plan.layout.output_bytes))
    with open_scribe(out, identity, ranks) as scribe:
        if scribe.is_complete:
            return ranks.share(lambda: _publish(scribe.workspace, out))
        blocks, allocation = _run(plan, execution, scribe, windows)

        def conclude() -> PruneRecord:
            assert scribe.workspace is not None, "rank 0 has the workspace"
            packed = quantization_config() if settings.packed else None
            files = scribe.workspace.add_side_files(source, packed)
            record = PruneRecord(
                versions=versions(),
                identity=identity,
                blocks=blocks,
                shards=_shards(plan, scribe.workspace),
                left_dense=plan.layout.left_dense,
                seconds=time.monotonic() - begun,
                finished=now(),
                allocation=allocation,
                files=files,
            )
            scribe.workspace.finish(record.to_json())
            return record

        return ranks.share(conclude)


def _publish(workspace: Workspace | None, out: Path) -> PruneRecord:
    assert workspace is not None, "rank 0 has the workspace"
    workspace.publish()
    return read_record(out, PruneRecord.from_json)


def _check_ranks(plan: Plan, ranks: Ranks) -> None:
    """Raise RanksError where processes see different models, or have nothing to do."""
    seen = {file: text.partition(",")[0] for file, text in plan.layout.sources.items()}
    theirs = ranks.share(lambda: seen)
    if seen != theirs:
        files = sorted(f for f in {*seen, *theirs} if seen.get(f) != theirs.get(f))
        raise RanksError(
            f"Process {ranks.rank} finds another {files[0]} in {plan.model} than "
            "process 0 does.",
            "Give every machine the same files of the model.",
        )
    settings = plan.settings
    fitted = settings.samples - max(settings.held_out, settings.judging)
    least = min(fitted, settings.judging or fitted)
    if ranks.size > least:
        raise RanksError(
            f"{ranks.size} processes were to share {least} windows.",
            "Start fewer processes, or pass more --samples.",
        )


def _run(
    plan: Plan, execution: Execution, scribe: Scribe, windows: Tensor | None
) -> tuple[tuple[BlockRecord, ...], AllocationRecord | None]:
    """Do what is left of a run, with smaller batches where memory is exhausted.

    How small stands in the ledger, so that a run that goes on has the same. Where
    several processes share the work, all would have to halve at once: there it fails.
    """
    ranks, length = execution.ranks, plan.settings.seq_len
    assert length is not None
    device = ranks.device(plan.settings.device)
    model = StreamedModel.open(plan.model, device, execution.trust_remote_code)
    first = model.batch_tokens

    def attempt(
        model: StreamedModel,
    ) -> tuple[tuple[BlockRecord, ...], AllocationRecord | None]:
        if model.batch_tokens < first and scribe.workspace is not None:
            scribe.workspace.decide(_BATCH, {"tokens": model.batch_tokens})
        run = Run(plan, execution, scribe, model, windows)
        return tuple(run.finish()), run.allocation

    model = replace(model, batch_tokens=scribe.noted(_BATCH).get("tokens", first))
    if ranks.size > 1:
        return attempt(model)
    return with_smaller_batches(model, length, attempt)


def _windows(plan: Plan, trust_remote_code: bool) -> Tensor | None:
    """Return calibration windows, None where the solver needs none."""
    settings = plan.settings
    ways = candidates(settings, plan.layout.dtype)
    asks = settings.has_dense or settings.held_out or settings.judging
    if {way.solver.statistic for way in ways} == {Nothing} and not asks:
        return None
    assert settings.seq_len is not None
    size = (settings.samples, settings.seq_len)
    if settings.calibration == "self":
        return sample_windows(plan.model, *size, settings.seed, trust_remote_code)
    corpus = load_corpus(settings.calibration, "calibration")
    encode = load_encoder(plan.model, trust_remote_code)
    windows = draw_windows(corpus, encode, *size, settings.seed)
    check_vocabulary(windows, plan.vocabulary)
    return windows


def _identity(plan: Plan, windows: Tensor | None) -> dict[str, Any]:
    digest = hashlib.sha256(windows.numpy().tobytes()) if windows is not None else None
    return plan.identity() | {
        "device": choose_device(plan.settings.device).type,
        "calibration_sha256": digest and digest.hexdigest(),
    }


def _shards(plan: Plan, workspace: Workspace) -> dict[str, str]:
    return {file: workspace.committed[file].sha256 for file in plan.layout.shards}
