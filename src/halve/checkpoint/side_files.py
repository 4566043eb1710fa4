"""The files of a checkpoint other than its weights: index, config, tokenizer, licence.

The index is written anew from the headers of the shards; the others are copied from
the source model.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.files import (
    copy_file,
    read_back_errors,
    read_errors,
    sha256,
    write_text,
)
from halve.checkpoint.output import MEASUREMENTS, RECORD
from halve.untrusted import is_inside, parse_json

_INDEX = "model.safetensors.index.json"
_QUANTIZATION = "quantization_config"
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")


def write_side_files(
    folder: Path,
    shards: Iterable[str],
    source: Path,
    quantization: dict[str, Any] | None,
) -> dict[str, str]:
    """Write the index, and copy the side files of the source model.

    Args:
        folder: The output, which holds the shards.
        shards: File names of the shards.
        source: Folder of the source model.
        quantization: The `quantization_config` for config.json; None for a model
            without packed matrices, whose config.json has no such entry.

    Returns:
        File name -> SHA-256.

    Raises:
        CheckpointError: A file of the source cannot be read.
        OutputError: A file cannot be written, or a shard not be read back.
    """
    with read_back_errors(folder / _INDEX):
        index = _index(folder, shards)
    write_text(folder / _INDEX, index)
    names = [path.name for path in find_side_files(source)]
    for name in names:
        copy_file(source / name, folder / name)
    _set_quantization(folder / "config.json", quantization)
    with read_errors(folder):
        return {name: sha256(folder / name) for name in (_INDEX, *names)}


def find_side_files(source: Path) -> list[Path]:
    """Return the files beside the weights that belong to the model, sorted.

    Links out of the folder are left out: a hostile checkpoint could make a private file
    part of what the user publishes.
    """
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and is_inside(source, path)
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and path.name not in {RECORD, MEASUREMENTS}
        and (path.suffix in _SUFFIXES or path.name.startswith(_PREFIXES))
    ]


def _index(folder: Path, shards: Iterable[str]) -> str:
    """Return the text of the index, made from the headers of the shards."""
    infos = Checkpoint.of_files(folder / shard for shard in shards).stored
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos)},
        "weight_map": {info.name: info.shard for info in infos},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _set_quantization(config: Path, entry: dict[str, Any] | None) -> None:
    """Set or remove the `quantization_config` of a config.json.

    The file is left as copied, to the byte, where the entry is right already.
    """
    with read_errors(config):
        entries = parse_json(config.read_text("utf-8"))
    if entries.get(_QUANTIZATION) == entry:
        return
    entries.pop(_QUANTIZATION, None)
    entries |= {_QUANTIZATION: entry} if entry else {}
    write_text(config, json.dumps(entries, indent=2, sort_keys=True) + "\n")
