"""A second reader of the packed format, written from its specification alone.

It favours clarity over speed. "check 3" in an error is number 3 of the list for this
kind of matrix in the section "What a reader checks".
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}
DTYPES |= {f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}
LARGEST = (2.0**128 - 2.0**104, 65504.0, 2.0**128 - 2.0**120)  # of F32, F16, BF16
BITMASK_PARTS = ("", "_mask", "_offsets", "_layout")
CODES_PARTS = ("", "_mask", "_offsets", "_scales", "_zeros", "_layout")


class Tensor(NamedTuple):
    """A stored tensor: kind is (dtype, *shape); data has 16-bit floats as float32."""

    kind: tuple
    data: np.ndarray


def require(name: str, check: int, *conditions: Any) -> None:
    """Reject the matrix unless all conditions of a numbered check hold."""
    if not all(conditions):
        raise ValueError(f"{name}: check {check} fails")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of one safetensors file."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"{name}: unknown dtype {dtype}")
        data = np.frombuffer(content[start + begin : start + end], DTYPES[dtype])
        if dtype == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        if dtype == "F16":
            data = data.astype(np.float32)
        shape = entry["shape"]
        tensors[name] = Tensor((dtype, *shape), data.reshape(shape))
    return tensors


def check_version(folder: Path) -> None:
    """Reject a version of the format that this reader does not know."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    entry = config.get("quantization_config") or {}
    if entry.get("quant_method") == "halve" and entry.get("version") not in (1, 2):
        raise ValueError(f"unknown version {entry.get('version')} of the format")


def mask_fits(mask: Tensor, offsets: Tensor, rows: int, columns: int) -> bool:
    """Whether dtypes and shapes of a mask and its offsets are right."""
    right = mask.kind == ("U64", rows, -(-columns // 64))
    return right and offsets.kind in (("U32", rows + 1), ("U64", rows + 1))


def read_mask(
    name: str, mask: Tensor, offsets: Tensor, length: int, columns: int, bits: int
) -> np.ndarray:
    """Return the mask as booleans [rows, columns], after checks 4 to 6.

    Offsets and length count bytes, of which a weight takes this number of bits; those
    of version 1 count values, as if a value were 8 bits.
    """
    first, *ends = offsets.data.tolist()
    require(name, 4, first == 0, ends[-1] == length)
    kept = np.unpackbits(mask.data.view(np.uint8), axis=1, bitorder="little") == 1
    sizes = -(-bits * kept.sum(axis=1) // 8)
    require(name, 5, ends == np.cumsum(sizes).tolist())
    require(name, 6, not kept[:, columns:].any())
    return kept[:, :columns]


def read_bitmask(name: str, tensors: dict[str, Tensor]) -> np.ndarray:
    """Return the dense tensor of a matrix stored as a bitmask and values."""
    parts: list[Any] = [tensors.get(name + part) for part in BITMASK_PARTS]
    require(name, 1, None not in parts)
    values, mask, offsets, layout = parts
    require(name, 2, layout.kind == ("I64", 3))
    rows, columns, transposed = layout.data.tolist()
    require(name, 2, mask.kind[1:2] == (rows,), transposed in (0, 1))
    require(name, 3, rows > 0, columns > 0, mask_fits(mask, offsets, rows, columns))
    require(name, 3, values.data.ndim == 1, values.kind[0] in ("BF16", "F16", "F32"))
    kept = read_mask(name, mask, offsets, values.data.size, columns, bits=8)
    dense = np.zeros((rows, columns), np.float32)
    dense[kept] = values.data
    return dense.T if transposed else dense


def unpack_codes(name: str, row: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return the codes in the bytes of one row, after check 7."""
    stream = np.unpackbits(row, bitorder="little")
    require(name, 7, not stream[bits * count :].any())
    return stream[: bits * count].reshape(count, bits) @ (1 << np.arange(bits))


def round_to_dtype(values: np.ndarray, dtype: int) -> np.ndarray:
    """Round float32 to F32 (0), F16 (1) or BF16 (2), ties to even, and -0 to 0."""
    if dtype == 1:
        values = values.astype(np.float16).astype(np.float32)
    if dtype == 2:
        word = values.view(np.uint32)
        word = word + 0x7FFF + (word >> 16 & 1)
        values = (word & 0xFFFF0000).view(np.float32)
    return values + np.float32(0)


def read_codes(name: str, tensors: dict[str, Tensor]) -> np.ndarray:
    """Return the dense tensor of a matrix stored as codes."""
    parts: list[Any] = [tensors.get(name + part) for part in CODES_PARTS]
    packed, mask, offsets, scales, zeros, layout = parts
    require(name, 1, packed and scales, (mask is None) == (offsets is None))
    rows, columns, transposed, bits, group_size, dtype, zero = layout.data.tolist()
    require(name, 2, scales.kind[1:2] == (rows,), transposed in (0, 1))
    require(name, 2, bits in (2, 3, 4, 8), dtype in (0, 1, 2), zero in (0, 1, 2))
    require(name, 2, group_size > 0, group_size % 32 == 0 or group_size >= columns)
    require(name, 2, (zeros is not None) == (zero == 1))
    groups = -(-columns // group_size)
    shape = (packed.data.size,) if mask else (rows, -(-columns * bits // 8))
    require(name, 3, rows > 0, columns > 0, packed.kind == ("U8", *shape))
    require(name, 3, not mask or mask_fits(mask, offsets, rows, columns))
    require(name, 3, scales.kind == ("F16", rows, groups), (zero, bits) != (2, 8))
    require(name, 3, not zeros or zeros.kind == ("U8", rows, -(-groups * bits // 8)))

    kept, pieces = np.ones((rows, columns), bool), list(packed.data)
    if mask:
        kept = read_mask(name, mask, offsets, packed.data.size, columns, bits)
        pieces = np.split(packed.data, offsets.data[1:-1].tolist())
    counts = kept.sum(axis=1)
    lines = [
        unpack_codes(name, *line, bits) for line in zip(pieces, counts, strict=True)
    ]
    middle = np.full((rows, groups), 2 ** (bits - 1) - (0.5 if zero == 2 else 0))
    if zeros:
        middle = np.stack([unpack_codes(name, z, groups, bits) for z in zeros.data])
    scale = scales.data
    require(name, 8, np.isfinite(scale).all(), (scale != 0).all())
    require(name, 8, 2**bits * abs(scale).max() <= LARGEST[dtype])

    codes = np.zeros((rows, columns), np.float32)
    codes[kept] = np.concatenate(lines)
    group = np.arange(columns) // group_size
    values = (codes - middle.astype(np.float32)[:, group]) * scale[:, group]
    dense = np.where(kept, round_to_dtype(values, dtype), np.float32(0))
    return dense.T if transposed else dense


def join_stacks(unpacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return packed matrices with the slices of every stack joined."""
    slices: dict[str, dict[int, np.ndarray]] = {}
    for name in [name for name in unpacked if name.endswith("].weight")]:
        stack, _, index = name.removesuffix("].weight").rpartition("[")
        slices.setdefault(stack, {})[int(index)] = unpacked.pop(name)
    stacks = {name: [own[i] for i in range(len(own))] for name, own in slices.items()}
    return unpacked | {name: np.stack(own) for name, own in stacks.items()}


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Return every parameter of a checkpoint, dense, with its floats as float32."""
    check_version(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    kinds = {name: tensor.kind for name, tensor in tensors.items()}
    codes = [name[:-7] for name in kinds if name.endswith("_layout")]
    codes = [name for name in codes if kinds[name + "_layout"] == ("I64", 7)]
    masked = [name[:-5] for name in kinds if name.endswith("_mask")]
    masked = [name for name in masked if kinds[name + "_mask"][0] == "U64"]
    masked = [n for n in masked if n not in codes and n + "_scales" not in kinds]
    unpacked = {name: read_codes(name, tensors) for name in codes}
    unpacked |= {name: read_bitmask(name, tensors) for name in masked}
    parts = {name + part for name in codes for part in CODES_PARTS}
    parts |= {name + part for name in masked for part in BITMASK_PARTS}
    dense = {name: tensors[name].data for name in kinds if name not in parts}
    return dense | join_stacks(unpacked)
