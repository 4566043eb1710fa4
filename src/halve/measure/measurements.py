"""Measurements of an output, kept in its folder (`measurements.json`)."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from halve.checkpoint import MEASUREMENTS, RECORD, Checkpoint, resolve_model, sha256
from halve.checkpoint.files import write_text
from halve.errors import HalveError
from halve.records import ComparisonRecord, now, versions
from halve.records.measurement import (
    Measurement,
    Result,
    kind_of,
    measurements_to_json,
)
from halve.records.stored import read_measurements
from halve.runtime.machine import this_machine


def check_keepable(model: str | Path | None) -> Path:
    """Return the folder of an output whose measurements can be kept.

    Called before a measurement, which takes longer.

    Raises:
        HalveError: Halve has not written the folder, or its `measurements.json` is
            damaged or of another output.
    """
    folder = None if model is None else resolve_model(model)
    if folder is None or not (folder / RECORD).is_file():
        raise HalveError(
            f"There is no {RECORD} in {folder or 'a random model'}, so a measurement "
            "cannot be kept with it.",
            "Measure a folder that Halve has written, or omit --keep.",
        )
    read_measurements(folder)
    return folder


def keep_measurement(
    folder: Path,
    result: Result,
    reference: str | None = None,
) -> None:
    """Add a measurement to those of an output, in the place of one of the same thing.

    Args:
        folder: The output, from `check_keepable`.
        result: What was measured.
        reference: The model it was compared with, if any.

    Raises:
        OutputError: The file cannot be written.
    """
    added = Measurement(
        kind=kind_of(result),
        of=sha256(folder / RECORD),
        reference=reference or "",
        reference_sha256=_digest(reference) if reference else "",
        data_sha256=_data_sha256(result),
        record=asdict(result),
        versions=versions(),
        machine=this_machine(torch.device("cpu")),
        finished=now(),
    )
    others = [m for m in read_measurements(folder) if _subject(m) != _subject(added)]
    write_text(folder / MEASUREMENTS, measurements_to_json((*others, added)))


def _subject(measurement: Measurement) -> tuple[str, ...]:
    """Return what two measurements of the same thing have in common."""
    m = measurement
    return m.kind, m.reference_sha256, m.data_sha256, str(m.record.get("gpu"))


def _data_sha256(result: Result) -> str:
    record = result.model if isinstance(result, ComparisonRecord) else result
    return getattr(record, "data_sha256", "")


def _digest(reference: str) -> str:
    """Return a digest of a model's config, and of names and sizes of its tensors."""
    folder = resolve_model(reference)
    tensors = Checkpoint.open(folder).tensors.values()
    described = [sha256(folder / "config.json")]
    described += sorted(f"{t.name} {list(t.shape)} {t.stored_bytes}" for t in tensors)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
