"""Measurements of an output, kept in its folder (`measurements.json`)."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from halve.checkpoint import MEASUREMENTS, RECORD, Checkpoint, resolve_model, sha256
from halve.checkpoint.files import write_text
from halve.errors import CheckpointError, HalveError
from halve.records import BenchRecord, ComparisonRecord, PerplexityRecord, now, versions
from halve.records.checksum import has_valid_checksum
from halve.records.measurement import (
    Measurement,
    measurements_to_json,
    parse_measurements,
)
from halve.runtime.machine import this_machine
from halve.untrusted import read_bytes

_REMEDY = "Remove the file, and measure again with --keep."


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


def read_measurements(folder: Path) -> tuple[Measurement, ...]:
    """Return the measurements of an output; none if none were kept.

    Raises:
        CheckpointError: The file is damaged, or its measurements are of an output that
            was in the folder before.
    """
    path = folder / MEASUREMENTS
    if not path.exists():
        return ()
    try:
        data = read_bytes(path, folder)
        if not has_valid_checksum(data):
            raise ValueError("it does not match its own checksum")  # noqa: TRY301
        measurements = parse_measurements(data.decode())
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error)[:200]}).", _REMEDY
        ) from error
    digest = sha256(folder / RECORD)
    if any(measurement.of != digest for measurement in measurements):
        raise CheckpointError(
            f"{path} holds measurements of another output than the one in {folder}.",
            _REMEDY,
        )
    return measurements


def keep_measurement(
    folder: Path,
    result: PerplexityRecord | ComparisonRecord | BenchRecord,
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
        kind="bench" if isinstance(result, BenchRecord) else "eval",
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


def _data_sha256(result: PerplexityRecord | ComparisonRecord | BenchRecord) -> str:
    if isinstance(result, BenchRecord):
        return ""
    record = result.model if isinstance(result, ComparisonRecord) else result
    return record.data_sha256


def _digest(reference: str) -> str:
    """Return a digest of a model's config, and of names and sizes of its tensors."""
    folder = resolve_model(reference)
    tensors = Checkpoint.open(folder).tensors.values()
    described = [sha256(folder / "config.json")]
    described += sorted(f"{t.name} {list(t.shape)} {t.stored_bytes}" for t in tensors)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
