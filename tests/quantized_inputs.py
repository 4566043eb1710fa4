"""Writers of quantized and sparse checkpoints, and the dense weights that they mean.

A new format is one row of `WRITERS`: a function from a weight to the tensors that a
file holds for it and to the dense weight, both in plain torch, and the entry of
config.json. The formats are those of other projects. That compressed-tensors writes the
same was checked by hand (docs/log.md).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

WEIGHTS = "model.safetensors"
FP8 = torch.float8_e4m3fn
_MOST = {FP8: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Writer:
    """A format of quantized or sparse weights.

    Attributes:
        write: (module, weight) -> tensors by name; the dense weight.
        entry: The `quantization_config` of config.json.
        label: What `halve inspect` calls it.
    """

    write: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
    entry: dict[str, Any]
    label: str


def tiles(weight: Tensor, tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Return where the tiles of a matrix are, row after row; the last are partial."""
    rows, columns = weight.shape
    return [
        (slice(r, r + tile[0]), slice(c, c + tile[1]))
        for r in range(0, rows, tile[0])
        for c in range(0, columns, tile[1])
    ]


def encoded(
    weight: Tensor, tile: tuple[int, int], dtype: torch.dtype, scale: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return codes and scales, rounded to nearest; scales are [tiles down, across]."""
    rows, columns = weight.shape
    tile = (min(tile[0], rows), min(tile[1], columns))
    codes, scales = torch.empty(weight.shape, dtype=dtype), []
    for place in tiles(weight, tile):
        part = weight[place].float()
        scales.append((part.abs().max() / _MOST[dtype]).to(scale))
        numbers = part / scales[-1].float()
        codes[place] = (numbers if dtype.is_floating_point else numbers.round()).to(
            dtype
        )
    return codes, torch.stack(scales).view(-(-rows // tile[0]), -1)


def decoded(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the dense weight in bfloat16, each tile by transformers' own function."""
    dense = torch.empty(codes.shape, dtype=torch.bfloat16)
    one = Fp8Dequantize(None)._dequantize_one
    flat = scales.reshape(-1)
    for n, place in enumerate(tiles(codes, tile)):
        dense[place] = one(codes[place], flat[n].view(1, 1), torch.bfloat16)
    return dense


def fp8(
    tile: tuple[int, int], scale: torch.dtype = torch.float32
) -> Callable[..., Any]:
    """Return a writer of FP8 with scales of tiles, as transformers names them."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = encoded(weight, tile, FP8, torch.float32)
        if scale == torch.float8_e8m0fnu:
            scales = scales.log2().ceil().exp2()
            codes = (weight.float() / spread(scales, weight, tile)).to(FP8)
        dense = decoded(codes, scales, tile)
        tensors = {
            f"{module}.weight": codes,
            f"{module}.weight_scale_inv": scales.to(scale),
            f"{module}.activation_scale": torch.ones(()),
        }
        return tensors, dense

    return write


def spread(scales: Tensor, weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the scale of each weight."""
    spread = torch.empty(weight.shape)
    flat = scales.reshape(-1)
    for n, place in enumerate(tiles(weight, tile)):
        spread[place] = flat[n]
    return spread


def compressed(
    tile: tuple[int, int],
    dtype: torch.dtype,
    shape: tuple[int, ...] = (),
    zero: int = 0,
) -> Callable[..., Any]:
    """Return a writer of codes as compressed-tensors names them, scales in bfloat16.

    Args:
        tile: Rows and columns that share a scale.
        dtype: Of the codes.
        shape: Of the scales; that of the tiles where it is empty.
        zero: Zero point of every other tile.
    """

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales = encoded(weight, tile, dtype, torch.bfloat16)
        zeros = torch.zeros(scales.shape, dtype=torch.int8)
        zeros.view(-1)[::2] = zero
        # compressed-tensors' arithmetic: all in the dtype of the scales.
        shifted = codes.to(torch.bfloat16) - spread(zeros, weight, tile).bfloat16()
        dense = shifted * spread(scales, weight, tile).bfloat16()
        tensors = {
            f"{module}.weight": codes,
            f"{module}.weight_scale": scales.view(shape or scales.shape),
            f"{module}.input_scale": torch.ones(1),
        }
        if zero:
            tensors[f"{module}.weight_zero_point"] = zeros.view(shape or scales.shape)
        return tensors, dense

    return write


def bitmask(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Write sparse-bitmask; half of the weights become zero."""
    dense = weight.where(weight > 0, 0)
    return _bitmask(module, dense, dense != 0, flat=True), dense


def bitmask_24(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Write sparse-24-bitmask; the first two weights of four remain."""
    kept = (torch.arange(weight.shape[1]) % 4 < 2).expand(weight.shape)
    return _bitmask(module, weight, kept, flat=False), weight.where(kept, 0)


def bitmask_24_fp8(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Write sparse-24-bitmask of FP8 codes with a scale for each row."""
    kept = (torch.arange(weight.shape[1]) % 4 < 2).expand(weight.shape)
    sparse = weight.where(kept, 0)
    tensors, dense = compressed((1, 2**20), FP8)(module, sparse)
    codes = tensors.pop(f"{module}.weight")
    return tensors | _bitmask(module, codes, kept, flat=False), dense


def _bitmask(
    module: str, stored: Tensor, kept: Tensor, flat: bool
) -> dict[str, Tensor]:
    rows, columns = kept.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.int64)
    padded[:, :columns] = kept
    octets = (padded.view(rows, -1, 8) << torch.arange(8)).sum(-1)
    octet_view = stored.view(torch.uint8) if stored.dtype == FP8 else stored
    values = octet_view[kept].view(stored.dtype)
    counts = kept.sum(1)
    shape = torch.tensor([rows, columns])
    return {
        f"{module}.compressed": values if flat else values.view(rows, -1),
        f"{module}.bitmask": octets.to(torch.uint8),
        f"{module}.shape": shape if flat else shape.view(2, 1),
    } | ({f"{module}.row_offsets": counts.cumsum(0) - counts} if flat else {})


def _groups(kind: str, format: str, **weights: object) -> dict[str, Any]:
    """Return an entry of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }


def _sparse(format: str, codes: dict[str, Any] | None = None) -> dict[str, Any]:
    sparsity = {"format": format, "targets": ["Linear"], "ignore": ["lm_head"]}
    entry = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    return (codes or {}) | entry


def _fp8_entry(tile: tuple[int, int] | None) -> dict[str, Any]:
    sizes = None if tile is None else list(tile)
    return {"quant_method": "fp8", "weight_block_size": sizes, "fmt": "e4m3"}


_FLOAT, _INT = ("float", "float-quantized"), ("int", "int-quantized")
WIDE = 2**20
WRITERS: dict[str, Writer] = {
    "fp8 blocks": Writer(fp8((16, 16)), _fp8_entry((16, 16)), "fp8, 16 x 16"),
    # The last tiles are partial, as with DeepSeek-V3's 576 rows: 64 and 128 in 24s.
    "fp8 partial blocks": Writer(fp8((24, 24)), _fp8_entry((24, 24)), "fp8, 24 x 24"),
    "fp8 per tensor": Writer(fp8((WIDE, WIDE)), _fp8_entry(None), "fp8, 64 x 64"),
    "mxfp8": Writer(
        fp8((1, 32), torch.float8_e8m0fnu), _fp8_entry((1, 32)), "fp8, 1 x 32"
    ),
    "float-quantized, channel": Writer(
        compressed((1, WIDE), FP8), _groups(*_FLOAT, strategy="channel"), "fp8, 1 x 64"
    ),
    "float-quantized, tensor": Writer(
        compressed((WIDE, WIDE), FP8, (1,)),
        _groups(*_FLOAT, strategy="tensor"),
        "fp8, 64 x 64",
    ),
    "float-quantized, blocks": Writer(
        compressed((24, 16), FP8),
        _groups(*_FLOAT, strategy="block", block_structure=[24, 16]),
        "fp8, 24 x 16",
    ),
    "int-quantized, channel": Writer(
        compressed((1, WIDE), torch.int8),
        _groups(*_INT, strategy="channel"),
        "int8, 1 x 64",
    ),
    "int-quantized, groups": Writer(
        compressed((1, 16), torch.int8, zero=-3),
        _groups(*_INT, strategy="group", group_size=16, symmetric=False),
        "int8, 1 x 16",
    ),
    "sparse-bitmask": Writer(bitmask, _sparse("sparse-bitmask"), "sparse-bitmask"),
    "sparse-24-bitmask": Writer(
        bitmask_24, _sparse("sparse-24-bitmask"), "sparse-24-bitmask"
    ),
    "sparse-24-bitmask of fp8": Writer(
        bitmask_24_fp8,
        _sparse("sparse-24-bitmask", _groups(*_FLOAT, strategy="channel")),
        "sparse-24-bitmask, fp8, 1 x 64",
    ),
}


def write_both(model: Path, row: str, quantized: Path, dense: Path) -> None:
    """Write a Llama of 16 bits in a format, and the dense model that it stands for.

    Args:
        model: Folder of the model, in one file.
        row: Row of `WRITERS`.
        quantized: Folder to write the matrices of the blocks to in the format.
        dense: Folder to write the same model to, dense.
    """
    writer = WRITERS[row]
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(model / WEIGHTS).items():
        module = name.removesuffix(".weight")
        meant[name] = stored[name] = tensor
        if module.endswith("_proj"):
            del stored[name]
            parts, meant[name] = writer.write(module, tensor)
            stored |= parts
    for folder, tensors in ((quantized, stored), (dense, meant)):
        folder.mkdir(parents=True)
        for path in model.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contents, folder / WEIGHTS, {"format": "pt"})
    announce(quantized, writer.entry)


def announce(folder: Path, entry: object, name: str = "quantization_config") -> None:
    """Write an entry into a config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {name: entry}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
