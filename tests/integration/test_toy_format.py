"""A second packed format needs a module, a registry row and a layer class, no more.

The toy format stores the coordinates of every nonzero weight. It is registered beside
the bitmask, as the format that is written, and every verb runs on it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import halve
from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError, HalveError
from halve.formats import FORMATS, Format, PackedMatrix, TensorHeader, registry
from halve.grids import QuantParams, QuantScheme
from halve.measure import bench_cases, measure_speed
from halve.runtime.cpu.layers import LAYERS
from halve.runtime.cpu.packed_linear import PackedLinear
from tests.interruptions import digests
from tests.tables import files_of_at_most

# Coordinates take two bytes each, so that 75 % zeros make a bfloat16 matrix smaller.
SPARSITY = "75%"


@dataclass(frozen=True)
class CoordinateMatrix(PackedMatrix):
    """Values with the row and the column of each, all [kept]."""

    values: Tensor
    rows: Tensor
    columns: Tensor
    size: tuple[int, int]  # outputs, inputs
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.size
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def label(self) -> str:
        return "coordinates"

    @property
    def parts(self) -> dict[str, Tensor]:
        return {
            "": self.values,
            "_rows": self.rows,
            "_columns": self.columns,
            "_size": torch.tensor([*self.size, int(self.transposed)]),
        }

    def to(self, dtype: torch.dtype) -> Self:
        return replace(self, values=self.values.to(dtype))

    def check_shapes(self, name: str) -> None:
        shapes = {tuple(part.shape) for part in (self.values, self.rows, self.columns)}
        if len(shapes) > 1:
            raise CheckpointError(f"{name} lacks coordinates.", "Pack it again.")

    def check(self, name: str) -> None:
        self.check_shapes(name)
        for numbers, size in zip((self.rows, self.columns), self.size, strict=True):
            wide = numbers.to(torch.int64)
            if bool(((wide < 0) | (wide >= size)).any()):
                raise CheckpointError(f"{name} leaves its shape.", "Pack it again.")

    def unpack(self) -> Tensor:
        dense = self.values.new_zeros(self.size)
        dense[self.rows.long(), self.columns.long()] = self.values
        return dense.T.contiguous() if self.transposed else dense


class Coordinates(Format):
    name: ClassVar[str] = "coordinates"
    companions: ClassVar[tuple[str, ...]] = ("_rows", "_columns", "_size")
    layout: ClassVar[tuple[str, ...]] = ("_size",)

    def recognizes(self, name: str, headers: Mapping[str, TensorHeader]) -> bool:
        return f"{name}_rows" in headers

    def count_kept(self, weight: Tensor) -> int:
        return int((weight.view(torch.int16) != 0).sum())

    def nbytes(
        self,
        shape: tuple[int, int],
        kept: int,
        dtype: torch.dtype,
        scheme: QuantScheme | None = None,
    ) -> int | None:
        return kept * (dtype.itemsize + 4) + 24 if dtype == torch.bfloat16 else None

    def pack(
        self,
        weight: Tensor,
        transposed: bool = False,
        quant_params: QuantParams | None = None,
    ) -> CoordinateMatrix:
        weight = weight.T.contiguous() if transposed else weight
        rows, columns = (weight.view(torch.int16) != 0).nonzero(as_tuple=True)
        return CoordinateMatrix(
            weight[rows, columns],
            rows.to(torch.int16),
            columns.to(torch.int16),
            (weight.shape[0], weight.shape[1]),
            transposed,
        )

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> CoordinateMatrix:
        rows, columns, size = (tensors[name + end] for end in self.companions)
        outputs, inputs, transposed = size.tolist()
        shape = (outputs, inputs)
        return CoordinateMatrix(tensors[name], rows, columns, shape, bool(transposed))


class CoordinateLinear(PackedLinear):
    weight_rows: Tensor
    weight_columns: Tensor

    @property
    def packed(self) -> CoordinateMatrix:
        return CoordinateMatrix(
            self.weight.data,
            self.weight_rows,
            self.weight_columns,
            (self.out_features, self.in_features),
            self.transposed,
        )

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, self.dense_weight(), bias)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Register the toy format and let it be written."""
    monkeypatch.setitem(FORMATS, "coordinates", Coordinates())
    monkeypatch.setitem(LAYERS, "coordinates", CoordinateLinear)
    monkeypatch.setattr(registry, "WRITTEN", ("coordinates",))


@pytest.fixture(params=["llama", "gpt2"])
def folders(request, pico, tmp_path):
    """Return the pruned model and the same packed in the toy format."""
    dense = pico(request.param, dtype=torch.bfloat16)
    halve.prune(dense, tmp_path / "pruned", sparsity=SPARSITY, solver="magnitude")
    halve.pack(tmp_path / "pruned", tmp_path / "packed")
    return tmp_path / "pruned", tmp_path / "packed"


def test_what_is_packed_is_in_the_toy_format(folders):
    """Else the tests below would prove nothing."""
    infos = Checkpoint.open(folders[1]).tensors.values()
    packed = [info for info in infos if info.format is not None]
    assert {info.format for info in packed} == {"coordinates"}
    assert len(packed) >= 8
    for info in packed:
        names = [part.name.removeprefix(info.name) for part in info.parts]
        assert names == ["", "_rows", "_columns", "_size"]


def test_it_is_read_as_the_dense_model(folders):
    dense, packed = (Checkpoint.open(folder) for folder in folders)
    assert (dense.is_packed, packed.is_packed) == (False, True)
    assert list(dense.tensors) == list(packed.tensors)
    for name, info in dense.tensors.items():
        seen = packed.tensors[name]
        assert (seen.shape, seen.dtype) == (info.shape, info.dtype)
        assert torch.equal(packed.read([name])[name], dense.read([name])[name])


def test_unpack_gives_back_every_byte(folders, tmp_path):
    pruned, packed = folders
    halve.unpack(packed, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(pruned)


def test_pruning_packed_is_pruning_and_packing(pico, folders, request, tmp_path):
    row = request.node.callspec.params["folders"]
    dense = pico(row, dtype=torch.bfloat16)
    halve.prune(
        *(dense, tmp_path / "out"), sparsity=SPARSITY, solver="magnitude", packed=True
    )
    assert digests(tmp_path / "out") == digests(folders[1])


def test_inspect_and_verify_see_its_bytes(folders):
    before, after = (halve.inspect(folder) for folder in folders)
    for dense, packed in zip(before.matrices, after.matrices, strict=True):
        assert (dense.packed, packed.packed) == (False, True)
        assert dense.sparsity == packed.sparsity
        assert dense.packed_bytes == packed.packed_bytes == packed.bytes < dense.bytes
    assert not halve.verify(folders[1]).findings


def test_perplexity_is_exactly_that_of_the_dense(folders, text):
    options = {"data": str(text), "seq_len": 32, "segments": 4, "device": "cpu"}
    dense, packed = (halve.perplexity(folder, **options) for folder in folders)
    assert packed.perplexity == dense.perplexity


def test_it_can_be_pruned_further(folders, tmp_path):
    for folder in folders:
        out = tmp_path / f"{folder.name}-again"
        halve.prune(folder, out, sparsity="90%", solver="magnitude")
    assert digests(tmp_path / "pruned-again") == digests(tmp_path / "packed-again")


@torch.no_grad()
def test_transformers_loads_and_runs_it(folders, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    layers = [m for m in packed.modules() if isinstance(m, CoordinateLinear)]
    assert len(layers) >= 8
    ids = torch.arange(3, 15).view(1, -1)
    assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-5)
    packed.dequantize()
    assert not any(isinstance(m, CoordinateLinear) for m in packed.modules())
    assert torch.allclose(packed(ids).logits, dense(ids).logits, atol=1e-5)


def test_saved_again_it_is_the_same_tensor_for_tensor(folders, tmp_path):
    model = halve.load(folders[1], "cpu")
    model.save_pretrained(tmp_path / "again")
    again = halve.load(tmp_path / "again", "cpu").state_dict()
    before = model.state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_generate_writes_what_the_dense_model_does(folders):
    dense, packed = (
        halve.generate(folder, "def main(", max_new_tokens=8, device="cpu")
        for folder in folders
    )
    assert packed == dense


def test_bench_times_it(folders):
    records = measure_speed(folders[1], bench_cases(0, 2, (1,)), rounds=1)
    assert {record.backend for record in records} == {
        "torch",
        "halve dense",
        "halve packed",
    }


def test_too_few_zeros_are_refused_by_its_own_sizes(pico, tmp_path):
    """50 % zeros make a matrix smaller as a bitmask, and larger as coordinates."""
    dense = pico("llama", dtype=torch.bfloat16)
    with pytest.raises(HalveError, match=r"no matrix .* would get smaller"):
        halve.prune(dense, tmp_path / "out", sparsity="50%", packed=True)


def test_both_formats_are_read_side_by_side(pico, tmp_path, monkeypatch):
    """Each matrix is recognized by its own companions."""
    dense = pico("llama", dtype=torch.bfloat16)
    halve.prune(dense, tmp_path / "pruned", sparsity=SPARSITY, solver="magnitude")
    with files_of_at_most(0):
        halve.pack(tmp_path / "pruned", tmp_path / "coordinates")
        monkeypatch.setattr(registry, "WRITTEN", ("bitmask",))
        halve.pack(tmp_path / "pruned", tmp_path / "bitmask")
    index = json.loads(
        (tmp_path / "coordinates/model.safetensors.index.json").read_text()
    )
    shard = max(index["weight_map"].values())  # the last block
    (tmp_path / "coordinates" / shard).unlink()
    (tmp_path / "coordinates/model.safetensors.index.json").unlink()
    tensors = load_file(tmp_path / "bitmask" / shard)
    for path in (tmp_path / "coordinates").glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, tmp_path / "coordinates/model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "coordinates")
    formats = {info.format for info in checkpoint.tensors.values()}
    assert formats == {None, "bitmask", "coordinates"}
    expected = Checkpoint.open(tmp_path / "pruned")
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(checkpoint.read([name])[name], expected.read([name])[name])
    halve.load(tmp_path / "coordinates", "cpu")


def test_a_part_that_is_missing_is_named(folders):
    path = max(folders[1].glob("*.safetensors"))
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("_columns"))
    del tensors[gone]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        Checkpoint.of_files([path])
