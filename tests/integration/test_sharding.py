"""Small shards become files of about a gigabyte, with the same tensors."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halve
from halve.checkpoint import disk
from halve.checkpoint.safetensors_file import merge_files
from halve.errors import OutputError
from tests.integration.test_checkpoints import SPLIT, _shard
from tests.tables import files_of_at_most

INDEX = "model.safetensors.index.json"
PLAIN: dict[str, Any] = {"solver": "magnitude", "device": "cpu"}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(path).values())


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("verb", ["prune", "pack", "unpack", "recover"])
@pytest.mark.filterwarnings("ignore:No step:halve.HalveWarning")
def test_a_small_model_is_one_file_without_an_index(verb, pico, text, tmp_path):
    """As transformers saves it."""
    dense = pico("llama", dtype=torch.bfloat16)
    halve.prune(dense, tmp_path / "prune", **PLAIN)
    halve.pack(tmp_path / "prune", tmp_path / "pack")
    halve.unpack(tmp_path / "pack", tmp_path / "unpack")
    if verb == "recover":
        options = {"steps": 1, "samples": 4, "seq_len": 16, "calibration": str(text)}
        halve.recover(tmp_path / "prune", dense, tmp_path / "recover", **options)
    names = {path.name for path in (tmp_path / verb).iterdir()}
    weights = {name for name in names if "safetensors" in name}
    assert weights == {"model.safetensors"}
    assert not any("shard" in name for name in names)
    assert halve.verify(tmp_path / verb).sound


@pytest.mark.parametrize("size", [0, 60_000, 200_000, 600_000])
def test_files_are_as_large_as_allowed_and_hold_the_same(size, pico, tmp_path):
    dense = pico("llama", dtype=torch.bfloat16)
    halve.prune(dense, tmp_path / "whole", **PLAIN)
    with files_of_at_most(size):
        record = halve.prune(dense, tmp_path / "out", **PLAIN)
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in paths] == sorted(record.shards)
    count = len(paths)
    assert [path.name for path in paths] == [
        SPLIT[0].format(number, count) for number in range(1, count + 1)
    ]
    for path, following in pairwise(paths):
        assert _bytes(path) + _bytes(following) > size  # else they would be one
    assert _same(_tensors(tmp_path / "out"), _tensors(tmp_path / "whole"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for path in paths:
        assert {n for n, file in index.items() if file == path.name} == {
            *load_file(path)
        }
    loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )[1]  # pyright: ignore[reportIndexIssue]
    assert not any(loading.values()), loading


def test_files_are_no_larger_than_those_of_the_input(pico, tmp_path):
    source = pico("llama", dtype=torch.bfloat16)
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(source, tmp_path / "split", ignore=ignored)
    _shard(_tensors(source), tmp_path / "split", SPLIT)
    largest = max(_bytes(path) for path in (tmp_path / "split").glob("*.safetensors"))
    record = halve.prune(tmp_path / "split", tmp_path / "out", **PLAIN)
    assert len(record.shards) > 1
    embedding = max(t.nbytes for t in _tensors(source).values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert _bytes(path) <= max(largest, embedding)
    whole = halve.prune(source, tmp_path / "whole", **PLAIN)
    assert len(whole.shards) == 1
    assert _same(_tensors(tmp_path / "out"), _tensors(tmp_path / "whole"))


DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool]


def test_a_merged_file_is_what_the_library_reads(tmp_path):
    """Of any dtypes and odd sizes; each tensor begins at a multiple of its width."""
    generator = torch.Generator().manual_seed(0)
    paths, expected = [], {}
    for number in range(3):
        tensors = {
            f"{dtype}.{number}.\u00e9": torch.randint(
                0, 2, (2 * number + 1, 3), generator=generator
            ).to(dtype)
            for dtype in DTYPES
        }
        tensors[f"empty.{number}"] = torch.empty(0, 3)
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1], {"format": "pt"})
        expected |= tensors
    merged = tmp_path / "merged.safetensors"
    disk.write_pieces(merged, merge_files(paths))
    assert _same(load_file(merged), expected)
    with safe_open(merged, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = merged.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name in expected:
            assert entry["data_offsets"][0] % expected[name].itemsize == 0


def test_the_file_that_is_merged_is_counted_in_the_disk(pico, tmp_path, monkeypatch):
    """Shards and the file that they become are on the disk at once."""
    dense = pico("llama", dtype=torch.bfloat16)
    forecast = halve.plan(dense, **PLAIN).forecast
    assert forecast.disk == 2 * forecast.output
    with files_of_at_most(0):
        forecast = halve.plan(dense, **PLAIN).forecast
    assert forecast.disk == forecast.output
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * forecast.output - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="free"):
        halve.prune(dense, tmp_path / "out", **PLAIN)


def test_a_damaged_merged_file_is_made_again(pico, tmp_path, monkeypatch):
    """Its shards are gone, so that they are pruned again."""
    dense = pico("llama", dtype=torch.bfloat16)
    halve.prune(dense, tmp_path / "whole", **PLAIN)

    def fail(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", fail)  # of the side files, the first of all
        with pytest.raises(OutputError):
            halve.prune(dense, tmp_path / "out", **PLAIN)
    partial = tmp_path / "out.partial"
    names = {path.name for path in partial.iterdir()}
    assert names == {"ledger.jsonl", "model.safetensors"}
    data = bytearray((partial / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (partial / "model.safetensors").write_bytes(data)
    halve.prune(dense, tmp_path / "out", **PLAIN)
    whole, again = ((tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert again.read_bytes() == whole.read_bytes()
