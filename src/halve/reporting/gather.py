"""From an output folder to the facts about it."""

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from halve.errors import CheckpointError, RecordError, SourceError
from halve.model_path import local_folder
from halve.records import (
    OutputRecord,
    PackRecord,
    PruneRecord,
    RecoverRecord,
    parse_record,
)
from halve.records.stored import (
    PARSE_ERRORS,
    RECORD,
    REMEDY,
    file_damage,
    read_measurements,
    read_output_record,
    sha256,
)
from halve.reporting.facts import Facts
from halve.reporting.sizes import measure_sizes
from halve.untrusted import read_bytes

# Of the licence in a card.
_MAX_LICENSE = 100


def output_folder(out: str | Path) -> Path:
    """Return the folder of an output.

    Raises:
        SourceError: There is no such folder.
    """
    folder = local_folder(out)
    if folder is None:
        raise SourceError(
            f"The folder {out} does not exist.",
            "Pass a folder that Halve has written; of a model on the Hub, a local copy "
            "(`hf download`).",
        )
    return folder


def gather_facts(out: str | Path, dense: str | None = None) -> Facts:
    """Read all that is recorded about an output.

    Every file of the output is compared with its recorded SHA-256 first, so that a page
    never describes a model that has changed.

    Args:
        out: The output.
        dense: The dense model, whose card may name a licence; by default the folder
            that the record names.

    Raises:
        CheckpointError: A file is missing or damaged, or a number is not finite.
        RecordError: The record has another format.
        SourceError: There is no such folder.

    Cost:
        Reads every file once.
    """
    folder = output_folder(out)
    record = read_output_record(folder)
    digests = record.shards | record.files
    _check_files(folder, digests)
    history = list(_history(record))
    pruned = next((each for each in history if isinstance(each, PruneRecord)), None)
    packed = record if isinstance(record, PackRecord) else None
    recovered = next((r for r in history if isinstance(r, RecoverRecord)), None)
    return Facts(
        name=folder.resolve().name,
        record_sha256=sha256(folder / RECORD),
        files=len(digests),
        pruned=pruned,
        packed=packed,
        sizes=measure_sizes(folder, record, pruned),
        measurements=read_measurements(folder),
        license=_license(
            dense or (pruned.model.name if pruned and pruned.model else "")
        ),
        recovered=recovered,
    )


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if (problem := file_damage(folder / name, digest)) is not None:
            raise CheckpointError(
                f"{name} in {folder} differs from its record: {problem}.", REMEDY
            )


def _history(record: OutputRecord) -> Iterator[OutputRecord]:
    """Yield a record, and those of the outputs that it was made of, newest first."""
    yield record
    try:
        while not isinstance(record, PruneRecord) and record.source is not None:
            record = parse_record(json.dumps(record.source))
            yield record
    except (RecordError, *PARSE_ERRORS):
        return


def _license(dense: str) -> str:
    """Return the licence that the card in the dense model's folder names, if any."""
    folder = Path(dense).expanduser()
    try:
        text = read_bytes(folder / "README.md", folder).decode("utf-8")
        _, front, _ = text.split("---\n", 2)
        name = yaml.safe_load(front)["license"]
    except (OSError, yaml.YAMLError, RuntimeError, *PARSE_ERRORS):
        return ""
    return name[:_MAX_LICENSE] if isinstance(name, str) else ""
