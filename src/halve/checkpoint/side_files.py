"""The files of a model other than its weights: config, tokenizer, code, licence.

One rule says which they are (`select_side_files`): for what is downloaded from the Hub,
for what is copied into an output, and for what `verify` looks at. The index is written
anew from the headers of the shards.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from halve.checkpoint.checkpoint import Checkpoint
from halve.checkpoint.files import (
    copy_file,
    make_folders,
    read_back_errors,
    read_errors,
    sha256,
    write_text,
)
from halve.checkpoint.output import OWN_FILES
from halve.errors import CheckpointError
from halve.formats import ENTRIES, TEXT_CONFIG, declared_entry
from halve.untrusted import is_inside, parse_json

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
# Whatever transformers reads beside weights: configs, vocabularies, chat templates, and
# the code of models that come with their own.
_SUFFIXES = {
    *(".json", ".jinja", ".txt", ".model", ".py"),
    *(".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".tokenizer"),
}
# Licences, which have to be passed on with the model.
_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def select_side_files(names: Iterable[str]) -> list[str]:
    """Return the files of a model that transformers may read beside its weights.

    Files in subfolders are among them (`additional_chat_templates/tool_use.jinja`),
    unless a subfolder holds another model: one with a config.json of its own.

    Args:
        names: All files of a folder or repository, relative to it, with `/`.

    Returns:
        Those names, sorted.
    """
    paths = [PurePosixPath(name) for name in names]
    models = {path.parent for path in paths if path.name == CONFIG}
    others = models - {PurePosixPath()}
    return sorted(
        str(path)
        for path in paths
        if _is_side_file(path) and others.isdisjoint(path.parents)
    )


def _is_side_file(path: PurePosixPath) -> bool:
    if path.name in OWN_FILES or path.name.endswith(".index.json"):
        return False
    if any(part.startswith(".") for part in path.parts):
        return False
    return path.suffix in _SUFFIXES or path.name.startswith(_PREFIXES)


def find_side_files(source: Path) -> list[str]:
    """Return the side files of a folder, relative to it, sorted.

    Raises:
        CheckpointError: One is a link out of the folder, or to nothing. It cannot be
            copied, since a hostile checkpoint could make a private file part of what
            the user publishes; without it the output would be another model.
    """
    names = select_side_files(_walk(source))
    for name in names:
        if not (source / name).is_file():
            raise CheckpointError(
                f"{name} in {source} is a link to nothing, or no regular file.",
                "Put the file itself in its place, or remove it.",
            )
        if not is_inside(source, source / name):
            raise CheckpointError(
                f"{name} in {source} is a link out of the folder.",
                "Copy the file itself into the folder.",
            )
    return names


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it; linked folders are followed."""
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        path = Path(root)
        # A link to a folder above it would be followed for ever.
        seen.add(path.resolve())
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and (path / name).resolve() not in seen
        ]
        for name in files:
            yield (path / name).relative_to(folder).as_posix()


def write_side_files(
    folder: Path,
    files: Collection[str],
    source: Path,
    quantization: dict[str, Any] | None,
    changes: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Write the index, and copy the side files of the source model.

    Args:
        folder: The output, which holds the weights.
        files: Names of the files of weights. A single one needs no index.
        source: Folder of the source model.
        quantization: The `quantization_config` for config.json; None for a model
            without packed matrices, whose config.json has no such entry.
        changes: Entries of the language model's part of config.json -> new values.

    Returns:
        File name -> SHA-256.

    Raises:
        CheckpointError: A file of the source cannot be read, or is a link out of it.
        OutputError: A file cannot be written, or one of weights not be read back.
    """
    indexes = [_INDEX] if len(files) > 1 else []
    for name in indexes:
        with read_back_errors(folder / name):
            index = _index(folder, files)
        write_text(folder / name, index)
    names = find_side_files(source)
    for name in names:
        make_folders((folder / name).parent)
        copy_file(source / name, folder / name)
    _set_quantization(folder / CONFIG, quantization)
    _change_entries(folder / CONFIG, changes or {})
    with read_errors(folder):
        return {name: sha256(folder / name) for name in (*indexes, *names)}


def _index(folder: Path, files: Iterable[str]) -> str:
    """Return the text of the index, made from the headers of the files."""
    infos = Checkpoint.of_files(folder / file for file in files).stored
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in infos)},
        "weight_map": {info.name: info.shard for info in infos},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _set_quantization(config: Path, entry: dict[str, Any] | None) -> None:
    """Set or remove what a config.json says of compressed weights.

    The file is left as copied, to the byte, where the entry is right already.
    """
    with read_errors(config):
        entries = parse_json(config.read_text("utf-8"))
    if declared_entry(entries) == entry:
        return
    for part in (entries, entries.get(TEXT_CONFIG)):
        for name in ENTRIES if isinstance(part, dict) else ():
            part.pop(name, None)
    entries |= {ENTRIES[0]: entry} if entry else {}
    write_text(config, json.dumps(entries, indent=2, sort_keys=True) + "\n")


def _change_entries(config: Path, changes: Mapping[str, int]) -> None:
    """Change entries of a config.json: where they stand, or else where they belong."""
    if not changes:
        return
    with read_errors(config):
        entries = parse_json(config.read_text("utf-8"))
    text = entries.get(TEXT_CONFIG)
    for name, value in changes.items():
        inner = isinstance(text, dict) and (name in text or name not in entries)
        (text if inner else entries)[name] = value
    write_text(config, json.dumps(entries, indent=2, sort_keys=True) + "\n")
