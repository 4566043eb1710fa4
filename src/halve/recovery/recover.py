"""From the names of two models to a finished folder with the recovered one."""

import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from halve.checkpoint import (
    Checkpoint,
    TensorInfo,
    Workspace,
    check_space,
    find_side_files,
    is_finished,
    open_workspace,
    output_path,
    read_record,
    resolve_model,
    source_record,
)
from halve.errors import HalveError, HalveWarning, UnsupportedModelError
from halve.formats import VERSION, quantization_config
from halve.layout import Layout, make_layout
from halve.options import RecoverOptions
from halve.records import RecoverRecord, now, recorded_grids, versions
from halve.recovery.distill import Distillation, distill
from halve.recovery.saved_state import Run, saved_nbytes
from halve.recovery.student import load_student
from halve.recovery.windows import RecoveryWindows, recovery_windows
from halve.recovery.write import Output, write_shards
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.whole_model import whole_model
from halve.system import own_peak, peak_memory

# Options that change no result.
_NOT_IDENTITY = ("progress", "trust_remote_code", "device")


@dataclass(frozen=True)
class _Job:
    """What a run works on, once everything that can be refused has been checked.

    Attributes:
        model: The pruned model.
        dense: The dense model.
        layout: Files and matrices of the pruned model.
        options: The options.
        provenance: The fields of the pruned model's `halve.json`; None without one.
    """

    model: BlockwiseModel
    dense: BlockwiseModel
    layout: Layout
    options: RecoverOptions
    provenance: dict[str, Any] | None

    @property
    def grids(self) -> dict[str, Any]:
        """Tensor -> its quantization grid."""
        return recorded_grids(self.provenance)

    @property
    def unchanged(self) -> set[str]:
        """Names of the matrices that keep their values: those that are quantized."""
        grids, tensors = self.grids, self.model.checkpoint.tensors
        return {
            matrix.name
            for block in self.layout.blocks
            for matrix in block.matrices
            if matrix.name in grids or _holds_codes(tensors[matrix.tensor])
        }


def recover_model(
    model: str | Path, reference: str | Path, out: str | Path, options: RecoverOptions
) -> RecoverRecord:
    """Recover a pruned model; see `halve.recover` for the contract."""
    options.check()
    started, peak_before = time.monotonic(), peak_memory()
    source, dense = resolve_model(model), resolve_model(reference)
    out = output_path(out, source)
    output_path(out, dense)
    job = _open(source, dense, options)
    windows = recovery_windows(job.model, dense, options)
    identity = _identity(job, windows)
    if is_finished(out, identity):
        return read_record(out, RecoverRecord.from_json)
    find_side_files(source)  # refused, if they cannot be copied, before a folder exists
    check_space(out, job.layout.disk_bytes + saved_nbytes(job.layout.prunable))
    with open_workspace(out, identity, job.layout.files) as workspace:
        if workspace.is_complete:
            workspace.publish()
            return read_record(out, RecoverRecord.from_json)
        run, steps, trained = _train(job, windows, workspace)
        written = write_shards(
            Output(job.model, job.layout, job.grids, run.best), workspace
        )
        formats = workspace.formats
        packed = quantization_config(formats) if formats else None
        record = RecoverRecord(
            kind="recover",
            versions=versions(),
            identity=identity,
            against=str(reference),
            steps=steps,
            states=tuple(run.states),
            best_step=run.lowest.step,
            trained=trained,
            unchanged=tuple(sorted(job.unchanged)),
            matrices=written.matrices,
            shards={file: workspace.digests[file] for file in job.layout.files},
            source=job.provenance,
            seconds=time.monotonic() - started,
            finished=now(),
            bytes_peak=own_peak(peak_before),
            files=workspace.add_side_files(source, packed),
            heads=written.heads,
        )
        workspace.finish(record.to_json())
    return record


def _train(
    job: _Job, windows: RecoveryWindows, workspace: Workspace
) -> tuple[Run, int, int]:
    """Train; return where it ended, the number of steps, and that of parameters."""
    with (
        whole_model(job.dense),
        load_student(
            job.model, job.layout, job.unchanged, windows.training.shape[1]
        ) as student,
    ):
        distillation = Distillation(student, job.dense, windows, job.options, workspace)
        run, steps = distill(distillation)
    if not run.best:
        warnings.warn(
            f"No step of {steps} brought the model nearer to the dense one on held-out "
            "windows; the output has the weights of the input.",
            HalveWarning,
            stacklevel=3,
        )
    return run, steps, student.count


def _open(source: Path, dense: Path, options: RecoverOptions) -> _Job:
    trusted = options.trust_remote_code
    pair = [BlockwiseModel.open(f, options.device, trusted) for f in (source, dense)]
    model, reference = pair
    _refuse_foreign(model.checkpoint)
    sizes = [opened.meta_model.vocabulary for opened in pair]
    if sizes[0] != sizes[1]:
        raise HalveError(
            f"{source} has a vocabulary of {sizes[0]} tokens and {dense} one of "
            f"{sizes[1]}, so their predictions cannot be compared.",
            "Pass the dense model from which the first was made (--against).",
        )
    layout = make_layout(model.checkpoint, model.meta_model)
    return _Job(model, reference, layout, options, source_record(source))


def _holds_codes(info: TensorInfo) -> bool:
    """Whether a matrix is packed as integers, with or without a record of its grid."""
    return info.is_packed and not info.parts[0].dtype.is_floating_point


def _refuse_foreign(checkpoint: Checkpoint) -> None:
    infos = checkpoint.tensors.values()
    foreign = next((i for i in infos if i.found is not None and not i.is_packed), None)
    if foreign is not None:
        raise UnsupportedModelError(
            f"The model in {checkpoint.folder} is quantized ({foreign.label}), in a "
            "format that Halve only reads.",
            "Make it dense with `halve unpack` first.",
        )


def _identity(job: _Job, windows: RecoveryWindows) -> dict[str, Any]:
    """Return what two runs must have in common to produce the same bytes."""
    options = {
        field.name: getattr(job.options, field.name)
        for field in fields(job.options)
        if field.name not in _NOT_IDENTITY
    }
    dense = make_layout(job.dense.checkpoint, job.dense.meta_model)
    return {
        "verb": "recover",
        "format": VERSION,
        **options,
        "device": job.model.device.type,
        "sources": job.layout.sources,
        "dense_sources": dense.sources,
        **windows.identity(),
    }
