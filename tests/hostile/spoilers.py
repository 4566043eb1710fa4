"""Ways to damage the files of a model. Each takes the folder of a valid model."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
QUERY = "model.layers.1.self_attn.q_proj.weight"

Spoiler = Callable[[Path], object]


def config(**changes: object) -> Spoiler:
    """Change entries of config.json; None removes one."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        entries = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))

    return spoil


def text(file: str, contents: str) -> Spoiler:
    """Replace a text file."""
    return lambda folder: (folder / file).write_text(contents)


def data(file: str, contents: bytes) -> Spoiler:
    """Replace the weights by another file with these bytes."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / file).write_bytes(contents)

    return spoil


def remove(file: str) -> Spoiler:
    return lambda folder: (folder / file).unlink()


def both(*spoilers: Spoiler) -> Spoiler:
    def spoil(folder: Path) -> None:
        for one in spoilers:
            one(folder)

    return spoil


def truncate(size: int) -> Spoiler:
    """Truncate the weights to `size` bytes; if negative, remove as many."""

    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)

    return spoil


def header(change: Callable[[dict], object]) -> Spoiler:
    """Rewrite the header of the weights; the data follow unchanged."""

    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        contents = path.read_bytes()
        (size,) = struct.unpack("<Q", contents[:8])
        entries = json.loads(contents[8 : 8 + size])
        entries = change(entries) or entries
        new = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + contents[8 + size :])

    return spoil


def raw_header(contents: bytes, length: int | None = None) -> Spoiler:
    """Replace the header by these bytes, and the length that the file states."""
    length = len(contents) if length is None else length

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + contents)

    return spoil


def entry(**changes: object) -> Spoiler:
    """Change the header entry of one tensor."""
    return header(lambda entries: entries[QUERY].update(changes))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Spoiler:
    """Replace a tensor; None removes it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new.contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def one_value(name: str, value: float) -> Spoiler:
    """Set the last element of a tensor."""

    def change(old: torch.Tensor) -> torch.Tensor:
        old.view(-1)[-1] = value
        return old

    return tensor(name, change)


def index(change: Callable[[dict], object] = lambda _: None) -> Spoiler:
    """Turn the weights into one shard, and write its index with a change."""

    def spoil(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / SHARD)
        entries = {"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}
        new = change(entries)
        (folder / INDEX).write_text(json.dumps(entries if new is None else new))

    return spoil


def index_text(contents: str) -> Spoiler:
    """Turn the weights into one shard, with this text as its index."""
    return both(index(), text(INDEX, contents))


def indexed_as(shard: str) -> Spoiler:
    """Write an index that names another file for one tensor."""
    return index(lambda entries: entries["weight_map"].update({QUERY: shard}))


def outside(shard: str) -> Spoiler:
    """Do the same, with a file that exists outside the folder."""

    def spoil(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        indexed_as(shard.format(parent=folder.parent))(folder)

    return spoil


def link_out(folder: Path) -> None:
    """Replace the weights by a link to a file outside the folder."""
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside.safetensors")


def saved(contents: object) -> Spoiler:
    """Replace the weights by a file that torch.save writes for an object."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(contents, folder / BIN)

    return spoil


def changed_bin(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoiler:
    """Replace the weights by a pytorch_model.bin, with a change."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        change(tensors)
        torch.save(tensors, folder / BIN)

    return spoil


class Code:
    """An object that creates a file when it is unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def code(folder: Path) -> None:
    """Replace the weights by a bare pickle that runs code."""
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(pickle.dumps(Code(folder.parent / "code-ran")))


def code_in_archive(folder: Path) -> None:
    """Do the same, inside an archive that torch.save writes."""
    saved({"weight": torch.zeros(2), "code": Code(folder.parent / "code-ran")})(folder)
