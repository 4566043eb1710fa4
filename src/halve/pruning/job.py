"""The main job, from a model's name to a whole new folder."""

import datetime
import hashlib
import time
from importlib import metadata
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
    RECORD,
    Workspace,
    check_free,
    check_identity,
    check_space,
    locate,
    open_workspace,
    partial_of,
)
from halve.errors import OutputError
from halve.plan import Plan, Settings, make_plan
from halve.pruning.run import Execution, Progress, Run
from halve.records import PruneRecord
from halve.runtime.generation import sample_windows
from halve.runtime.streamed import choose_device
from halve.solvers import SOLVERS
from halve.statistics import Nothing


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
    source, out = locate(model), _path_of(out)
    if out.resolve() == source.resolve():
        raise OutputError(
            f"The output folder {out} is the model itself.",
            "Choose another output folder.",
        )
    plan = make_plan(source, settings, execution.trust_remote_code)
    windows = _windows(plan, execution.trust_remote_code)
    identity = _identity(plan, windows)
    if (done := _finished(out, identity)) is not None:
        depth = len(plan.blocks)
        phase = "all were finished before, nothing was done"
        execution.progress(Progress(depth - 1, depth, phase, None))
        return done
    check_space(out, plan.output_bytes)
    with open_workspace(out, identity) as workspace:
        if workspace.is_complete:
            workspace.publish()
            return PruneRecord.from_json((out / RECORD).read_text("utf-8"))
        blocks = Run(plan, execution, workspace, windows).finish()
        record = PruneRecord(
            versions=_versions(),
            identity=identity,
            blocks=tuple(blocks),
            shards=_shards(plan, workspace),
            left_dense=plan.left_dense,
            seconds=time.monotonic() - begun,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        workspace.finish(source, record.to_json(), plan.shard_bytes())
    return record


def _path_of(out: str | Path) -> Path:
    try:
        path = Path(out).expanduser()
        path.exists()
        partial_of(path).exists()  # a longer name
    except (OSError, RuntimeError) as error:  # too long a name, or an unknown ~user
        raise OutputError(
            f"{str(out)[:200]!r} is no name for a folder.",
            "Choose another output folder.",
        ) from error
    return path


def _finished(out: Path, identity: dict[str, Any]) -> PruneRecord | None:
    """Return the record of a folder that this very run has already made."""
    if not (out / RECORD).is_file():
        check_free(out)
        return None
    try:
        record = PruneRecord.from_json((out / RECORD).read_text("utf-8"))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise OutputError(
            f"{out} exists, and its {RECORD} is not one that Halve wrote.",
            "Remove it or choose another output folder.",
        ) from error
    check_identity(out, record.identity, identity)
    return record


def _windows(plan: Plan, trust_remote_code: bool) -> Tensor | None:
    """Return calibration windows, None where the solver needs none."""
    settings = plan.settings
    if SOLVERS[settings.solver].statistic is Nothing:
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


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("halve", "torch", "transformers")}


def _shards(plan: Plan, workspace: Workspace) -> dict[str, str]:
    return {file: workspace.committed[file].sha256 for file in plan.shards}
