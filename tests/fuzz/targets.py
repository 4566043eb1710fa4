"""The parsers of untrusted files: one row each, with valid files to start from.

`seeds` are the inputs that fuzzing starts with. `files` turns an input into the files
of a folder, and corrects lengths and checksums that random changes would always break.
`read` is the function that a user's command calls. It returns a value or raises
HalveError; anything else is a finding.
"""

import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save

from halve.calibration import load_corpus
from halve.checkpoint import Checkpoint, open_workspace, parse_note, read_record
from halve.formats import FORMATS, PackedMatrix, slice_name, split
from halve.formats.bitmask import pack
from halve.grids import QuantScheme, fit_quant_params
from halve.models import build_meta_model
from halve.records import (
    BlockRecord,
    MatrixRecord,
    MatrixStorage,
    PackRecord,
    PruneRecord,
)
from tests.quantized_inputs import WRITERS
from tests.tables import FAMILIES, family_config

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A parser to fuzz.

    Attributes:
        seeds: Returns valid inputs.
        files: Turns an input into files: name -> contents.
        read: Parses the folder that holds these files.
        tokens: Strings that such files contain, for the fuzzer to insert.
    """

    seeds: Callable[[], list[bytes]]
    files: Callable[[bytes], Files]
    read: Callable[[Path], object]
    tokens: tuple[str, ...] = ()

    def attempt(self, data: bytes) -> object:
        """Parse an input; return a value or raise HalveError."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, contents in self.files(data).items():
                (folder / file).write_bytes(contents)
            return self.read(folder)


def _framed(header: bytes, body: bytes) -> bytes:
    return struct.pack("<H", len(header)) + header + body


def _unframed(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:2], "little")
    return data[2 : 2 + size], data[2 + size :]


def _of_safetensors(file: bytes) -> bytes:
    (size,) = struct.unpack("<Q", file[:8])
    return _framed(file[8 : 8 + size], file[8 + size :])


def _as_safetensors(data: bytes) -> Files:
    """Prepend the correct header length: with a wrong one, nothing else is parsed."""
    header, body = _unframed(data)
    file = struct.pack("<Q", len(header)) + header + body
    return {"model.safetensors": file}


def _read_checkpoint(folder: Path) -> object:
    checkpoint = Checkpoint.open(folder)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read([name])[name]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    return checkpoint.shards


def _tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}


def _packed_tensors() -> list[dict[str, torch.Tensor]]:
    weights = [torch.eye(3, 70), torch.eye(5, 4).half(), torch.ones(1, 64).bfloat16()]
    transposed = [False, True, False]
    packed: list[PackedMatrix | None] = [
        pack(w, t) for w, t in zip(weights, transposed, strict=True)
    ]
    for weight, scheme in _quantized_seeds():
        params = fit_quant_params(scheme, weight)
        rounded = params.fake_quantize_kept(weight)
        packed.append(FORMATS["quantized"].pack(rounded, quant_params=params))
    files = [
        {name: t.clone() for name, t in split("w", p).items()} for p in packed if p
    ]
    stack = {
        name: part.clone()
        for index, weight in enumerate((torch.eye(5, 70), torch.ones(5, 70)))
        for name, part in split(slice_name("w", index), pack(weight, True)).items()
    }
    return [*files, stack]


def _quantized_seeds() -> list[tuple[torch.Tensor, QuantScheme]]:
    """Return matrices whose codes have zero points, a mask, or no level at zero."""
    dense = torch.linspace(-1, 1, 3 * 70).view(3, 70)
    sparse = dense.where(dense.abs() > 0.8, 0)
    return [
        (dense, QuantScheme(3, 32, symmetric=False)),
        (sparse, QuantScheme(8)),
        (dense, QuantScheme(2, midrise=True)),
    ]


def _as_announced(entry: dict[str, Any]) -> Callable[[bytes], Files]:
    """Add a config.json that says how the matrices are quantized."""
    config = json.dumps({"quantization_config": entry}).encode()
    return lambda data: _as_safetensors(data) | {"config.json": config}


def _written(*rows: str) -> list[dict[str, torch.Tensor]]:
    """Return a small matrix in some formats of other projects."""
    weight = torch.linspace(-1, 1, 6 * 48).view(6, 48).bfloat16()
    return [WRITERS[row].write("w", weight)[0] for row in rows]


def _compressed_seeds() -> list[bytes]:
    tensors = _written(
        *("float-quantized, blocks", "int-quantized, groups", "sparse-bitmask"),
        *("sparse-24-bitmask", "sparse-24-bitmask of fp8"),
    )
    return [_of_safetensors(save(contents)) for contents in tensors]


def _mxfp4_seeds() -> list[bytes]:
    octets = torch.arange(2 * 3 * 5 * 16).to(torch.uint8)
    tensors = {"e_blocks": octets.view(2, 3, 5, 16), "e_scales": octets[:30]}
    tensors["e_scales"] = tensors["e_scales"].view(2, 3, 5).clone()
    return [_of_safetensors(save(tensors))]


def _entry_files(data: bytes) -> Files:
    """Treat an input as what config.json says of an FP8 matrix of two tiles."""
    (tensors,) = _written("fp8 partial blocks")
    config = b'{"quantization_config": ' + data + b"}"
    return {"model.safetensors": save(tensors), "config.json": config}


def _entry_seeds() -> list[bytes]:
    """Return entries that give the size of its tiles."""
    own = WRITERS["fp8 partial blocks"].entry
    other = json.dumps(WRITERS["float-quantized, blocks"].entry)
    sizes = ("[24, 24]", '"24x24"')
    others = [other.replace("[24, 16]", size) for size in sizes]
    return [text.encode() for text in (json.dumps(own), *others)]


def _index_seeds() -> list[bytes]:
    maps = [{"a": "1.safetensors", "c": "2.safetensors"}, {"c": "2.safetensors"}]
    return [json.dumps({"metadata": {}, "weight_map": m}).encode() for m in maps]


def _index_files(data: bytes) -> Files:
    return {
        "model.safetensors.index.json": data,
        "1.safetensors": save({"a": torch.ones(2)}),
        "2.safetensors": save({"c": torch.ones(2)}),
    }


def _torch_saved(tensors: object, *, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def _pickle_seeds() -> list[bytes]:
    contents = [_tensors(), {"state_dict": _tensors()}, {"p": torch.nn.Parameter()}]
    files = [_torch_saved(c, old=old) for c in contents for old in (False, True)]
    inner = zipfile.ZipFile(io.BytesIO(files[0])).read("archive/data.pkl")
    return [b"f" + file for file in files] + [b"p" + inner]


def _pickle_files(data: bytes) -> Files:
    """Treat an input as a whole file, or as a pickle to put into a valid archive."""
    if data[:1] != b"p":
        return {"pytorch_model.bin": data[1:]}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in {
            "data.pkl": data[1:],
            "byteorder": b"little",
            "data/0": bytes(24),
            "data/1": bytes(8),
            "version": b"3\n",
        }.items():
            archive.writestr(f"archive/{name}", contents)
    return {"pytorch_model.bin": file.getvalue()}


def _config_seeds() -> list[bytes]:
    return [family_config(row).to_json_string().encode() for row in FAMILIES]


def _read_config(folder: Path) -> object:
    meta_model = build_meta_model(folder)
    return meta_model.path, meta_model.vocabulary, meta_model.default_length


def _corpus(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        corpus = load_corpus(str(folder / name), "calibration", render=str)
        return corpus.sha256

    return read


def _parquet_seeds() -> list[bytes]:
    table = pyarrow.table({"text": ["a", "b" * 99, "é"], "n": [1, 2, 3]})
    made = []
    kinds: list[dict[str, Any]] = [
        {},
        {"compression": "zstd"},
        {"use_dictionary": False},
    ]
    for options in [*kinds, {"data_page_version": "2.0"}]:
        file = io.BytesIO()
        parquet.write_table(table, file, **options)
        made.append(file.getvalue())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    chats = pyarrow.Table.from_pylist([{"text": chat}, {"text": None}])
    file = io.BytesIO()
    parquet.write_table(chats, file)
    return [*made, file.getvalue()]


@cache
def _records() -> tuple[str, str]:
    matrix = MatrixRecord("a.weight", 4, 8, 0.5, error=0.1, grid={"bits": 4}, bits=5.0)
    blocks = (BlockRecord("a", (matrix,), 0.1, 1.0, (0.2, 0.1)),)
    pruned = PruneRecord({"halve": "1"}, IDENTITY, blocks, {"f": "0"}, ("b",), 1.0, "")
    stored = (MatrixStorage("a.weight", 4, 8, 0.5, 0, 64, 40, True),)
    packed = PackRecord("pack", {}, IDENTITY, stored, {}, None, 1.0, "")
    return pruned.to_json(), packed.to_json()


IDENTITY = {"a": "1"}
_FILES = {
    "a.safetensors": ("a.safetensors",),
    "merged.safetensors": ("b.safetensors", "c.safetensors"),
}


def _as_record(data: bytes) -> Files:
    return {"halve.json": data}


def _read_pruned(folder: Path) -> object:
    record = read_record(folder, PruneRecord.from_json)
    return record.sparsity, record.bits, [block.zeros for block in record.blocks]


def _read_packed(folder: Path) -> object:
    record = read_record(folder, PackRecord.from_json)
    return record.dense_bytes, record.stored_bytes


def _ledger_seeds() -> list[bytes]:
    block = json.loads(_records()[0])["blocks"][0]
    lines = [
        {"identity": IDENTITY},
        {"decision": "allocation", "value": {"strength": 0.5}},
        {"file": "a.safetensors", "sha256": SHA256, "note": block},
    ]
    return [("\n".join(map(json.dumps, lines[:n])) + "\n").encode() for n in (1, 2, 3)]


# SHA-256 of an empty file.
SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def _ledger_files(data: bytes) -> Files:
    return {"ledger.jsonl": data, "a.safetensors": b""}


def _read_ledger(folder: Path) -> object:
    partial = folder / "out.partial"
    partial.mkdir()
    for path in (folder / "ledger.jsonl", folder / "a.safetensors"):
        path.rename(partial / path.name)
    with open_workspace(folder / "out", IDENTITY, _FILES) as workspace:
        notes = [c.note for c in workspace.committed.values()]
        return [parse_note(workspace.folder, BlockRecord, note) for note in notes]


_HEADER = (
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "F32",
    "BF16",
    "U64",
    "I64",
)
_PACKED = (
    *(*_HEADER, "U8", "F16", '"w"', "w_mask", "w_offsets", "w_layout"),
    *("w_scales", "w_zeros", "w[0].weight", "w[1].weight", "w[2].weight_mask"),
)
_QUANTIZED = (
    *(*_HEADER, "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", '"w.weight"'),
    *("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    *("w.compressed", "w.bitmask", "w.shape", "w.row_offsets", "e_blocks", "e_scales"),
)
_ENTRY = (
    *("quant_method", "compressed-tensors", "fp8", "mxfp4", "config_groups", "weights"),
    *("block_structure", "weight_block_size", "sparsity_config", "format", "null"),
    *("1000000000000", "-1", "true", "[128, 128]", '"128x128"', "{}", "[]"),
)
_CONFIG = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "null"),
    *("architectures", "model_type", "layer_types", "text_config", "rope_scaling"),
    *("head_dim", "n_positions", "Infinity", "NaN", "1000000000", "-1", "true", "{}"),
    *("auto_map", "quantization_config", "get_text_config", "attribute_map", "1e999"),
)
_RECORD = (
    "blocks",
    "matrices",
    "null",
    "NaN",
    "1e999",
    "-1",
    "true",
    '"a"',
    "{}",
    "[]",
)
_PICKLE = ("ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n", "PK")
TARGETS = {
    "safetensors": Target(
        lambda: [_of_safetensors(save(_tensors()))],
        _as_safetensors,
        _read_checkpoint,
        _HEADER,
    ),
    "index": Target(
        _index_seeds,
        _index_files,
        _read_checkpoint,
        ("weight_map", "1.safetensors", "2.safetensors", "..", "/"),
    ),
    "packed": Target(
        lambda: [_of_safetensors(save(tensors)) for tensors in _packed_tensors()],
        _as_safetensors,
        _read_checkpoint,
        _PACKED,
    ),
    "compressed": Target(
        _compressed_seeds,
        _as_announced(WRITERS["float-quantized, blocks"].entry),
        _read_checkpoint,
        _QUANTIZED,
    ),
    "mxfp4": Target(
        _mxfp4_seeds,
        _as_announced({"quant_method": "mxfp4"}),
        _read_checkpoint,
        _QUANTIZED,
    ),
    "quantization-entry": Target(_entry_seeds, _entry_files, _read_checkpoint, _ENTRY),
    "pickle": Target(_pickle_seeds, _pickle_files, _read_checkpoint, _PICKLE),
    "config": Target(
        _config_seeds, lambda data: {"config.json": data}, _read_config, _CONFIG
    ),
    "txt": Target(
        lambda: [b"words\nmore words", "é\U0001f600".encode()],
        lambda data: {"a.txt": data},
        _corpus("a.txt"),
    ),
    "jsonl": Target(
        lambda: [b'{"text": "words"}\n{"text": "\\ud800", "b": [1, {}]}\n'],
        lambda data: {"a.jsonl": data},
        _corpus("a.jsonl"),
        ('"text":', "\\ud800", "\\u", "null", "NaN", "{}", "[]"),
    ),
    "parquet": Target(
        _parquet_seeds, lambda data: {"a.parquet": data}, _corpus("a.parquet")
    ),
    "record": Target(
        lambda: [_records()[0].encode()], _as_record, _read_pruned, _RECORD
    ),
    "pack-record": Target(
        lambda: [_records()[1].encode()], _as_record, _read_packed, _RECORD
    ),
    "ledger": Target(
        _ledger_seeds,
        _ledger_files,
        _read_ledger,
        (
            "identity",
            "decision",
            "value",
            "file",
            "sha256",
            "note",
            "..",
            "\n",
            "null",
        ),
    ),
}
