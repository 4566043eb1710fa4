"""Which quantized checkpoints are read, by the entry in config.json that says so.

transformers and others describe quantized weights in `quantization_config`, old
releases of compressed-tensors in `compression_config`; a model with several modalities
may have the entry within its `text_config`.
"""

from collections.abc import Iterator
from typing import Any

from halve.errors import UnsupportedModelError
from halve.formats.inputs.mxfp4 import Mxfp4
from halve.formats.inputs.scaled import Scaled
from halve.formats.inputs.sparse_bitmask import SparseBitmask
from halve.formats.interface import Reader
from halve.untrusted import truncated

ENTRIES = ("quantization_config", "compression_config")
TEXT_CONFIG = "text_config"
_FP8, _MXFP8, _MXFP4, _COMPRESSED = "fp8", "mxfp8", "mxfp4", "compressed-tensors"
METHODS = (_FP8, _MXFP8, _MXFP4, _COMPRESSED)
# Formats of compressed-tensors, where "-" and "_" are the same.
_READ = {
    "dense",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "mxfp8-quantized",
    "sparse-bitmask",
    "sparse-24-bitmask",
    # Of the whole model, where groups of modules differ; each group has its own.
    "mixed-precision",
}
_ORIGINAL = "Use the checkpoint that it was made from."
_REMEDIES = {
    "bitsandbytes": "Load it with transformers, call `model.dequantize()` and "
    "`model.save_pretrained()`, and use that; or the checkpoint that it was made from.",
    _COMPRESSED: "Load it with transformers and "
    "`CompressedTensorsConfig(dequantize=True)`, save it with "
    "`model.save_pretrained()`, and use that.",
}
_BLOCK_DIMENSIONS = 2
_BLOCK_SIZE = "weight_block_size"
# Where an entry of FP8 does not give the size (`FineGrainedFP8Config` of transformers).
_DEFAULT_BLOCK = [128, 128]


def declared_entry(config: object) -> dict[str, Any] | None:
    """Return what a config says of quantized weights; None if it says nothing.

    Args:
        config: The contents of a config.json. Of an entry that is no object nothing is
            known, and the result is empty.
    """
    if not isinstance(config, dict):
        return None
    for part in (config, config.get(TEXT_CONFIG)):
        entries = part if isinstance(part, dict) else {}
        for name in ENTRIES:
            if (entry := entries.get(name)) is not None:
                return _with_method(name, entry)
    return None


def _with_method(name: str, entry: object) -> dict[str, Any]:
    """Return an entry with its method, which that of old releases lacks."""
    if not isinstance(entry, dict):
        return {}
    old = {"quant_method": _COMPRESSED} if name == ENTRIES[1] and entry else {}
    return old | entry


def readers_of(entry: dict[str, Any] | None) -> list[Reader]:
    """Return what reads the matrices of a checkpoint with such an entry.

    None if there is no entry, or one of another method.
    """
    method = (entry or {}).get("quant_method")
    if entry is None or method not in METHODS:
        return []
    if method == _MXFP4:
        return [Mxfp4()]
    block = _block(entry)
    scaled = Scaled(block)
    return [SparseBitmask(block), scaled] if method == _COMPRESSED else [scaled]


def check_readable(where: object, entry: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if a checkpoint with such an entry is not read.

    Args:
        where: Folder or file, for the message.
        entry: As `declared_entry` returns it.
    """
    method = entry.get("quant_method")
    obstacle = _obstacle(entry)
    if obstacle is None:
        return
    known = method if isinstance(method, str) else ""
    raise UnsupportedModelError(
        f"The checkpoint in {where} is quantized ({truncated(obstacle)}), which Halve "
        f"does not read; of quantized weights it reads FP8, MXFP4, and int8 and sparse "
        "formats of compressed-tensors.",
        _REMEDIES.get(known, _ORIGINAL),
    )


def _obstacle(entry: dict[str, Any]) -> str | None:
    """Return what of an entry is not read; None if all is."""
    method = entry.get("quant_method")
    if method not in METHODS:
        return str(method or "method not given")
    if entry.get("expert_dtype") == "fp4":
        return f"{method} with experts in FP4"
    if method == _COMPRESSED:
        return _compressed_obstacle(entry)
    return None


def _compressed_obstacle(entry: dict[str, Any]) -> str | None:
    formats = {str(name).replace("_", "-") for name in _formats(entry)}
    if unread := sorted(formats - _READ):
        return f"{_COMPRESSED}, {unread[0]}"
    rotated = entry.get("transform_config")
    if isinstance(rotated, dict) and rotated.get("config_groups"):
        return f"{_COMPRESSED}, with rotated weights"
    if len(_block_structures(entry)) > 1:
        return f"{_COMPRESSED}, in blocks of several sizes"
    return None


def _formats(entry: dict[str, Any]) -> Iterator[object]:
    """Yield the formats that an entry of compressed-tensors names."""
    for part in (entry, entry.get("sparsity_config"), *_groups(entry)):
        name = part.get("format") if isinstance(part, dict) else None
        if name is not None:
            yield name


def _groups(entry: dict[str, Any]) -> list[dict[str, Any]]:
    groups = entry.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    return [group for group in values if isinstance(group, dict)]


def _block(entry: dict[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns of a block according to an entry, None if it gives none.

    Not trusted: `ScaledMatrix` uses it only if the number of scales agrees.
    """
    if entry.get("quant_method") == _COMPRESSED:
        return next(iter(_block_structures(entry)), None)
    return _sizes(entry.get(_BLOCK_SIZE, _DEFAULT_BLOCK))


def _block_structures(entry: dict[str, Any]) -> set[tuple[int, int]]:
    weights = [group.get("weights") for group in _groups(entry)]
    structures = [w.get("block_structure") for w in weights if isinstance(w, dict)]
    return {size for size in map(_sizes, structures) if size is not None}


def _sizes(value: object) -> tuple[int, int] | None:
    """Return two positive integers, given as a list or as `128x128`."""
    if isinstance(value, str):
        value = [int(n) if n.isdecimal() else 0 for n in value[:40].split("x")]
    if not isinstance(value, list) or len(value) != _BLOCK_DIMENSIONS:
        return None
    if not all(type(n) is int and n > 0 for n in value):
        return None
    return value[0], value[1]
