"""An error names the file that cannot be read; once it can, the run resumes.

It then writes the same bytes as a run without failures.
"""

import errno
import io
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import Checkpoint
from halve.checkpoint import safetensors_file as reader
from halve.errors import CheckpointError, OutputError
from tests.interruptions import Stopped, digests, stop_at
from tests.tables import save_pico

OPTIONS: dict[str, Any] = {
    "solver": "sparsegpt",
    "samples": 4,
    "seq_len": 16,
    "device": "cpu",
}


@pytest.fixture
def model(tmp_path):
    """Return a model in several shards, which a test may change."""
    folder = save_pico(tmp_path / "model", "llama", shard_size="300KB")
    assert len([*folder.glob("*.safetensors")]) == 3
    return folder


@pytest.fixture
def prune(model, text, tmp_path):
    """Return a function that prunes the model into a folder of the given name."""

    def run(name: str, **options) -> Path:
        out = tmp_path / name
        halve.prune(model, out, calibration=str(text), **OPTIONS | options)
        return out

    return run


def broken_reads(patch, count: int, error: OSError) -> list[int]:
    """Make the count-th read of a tensor fail; return the offsets read so far."""
    calls: list[int] = []
    real = reader._fill

    class Bad(io.BytesIO):
        def readinto(self, *_):
            raise error

    def fill(tensor, data: Any, place):
        calls.append(place)
        real(tensor, cast("Any", Bad()) if len(calls) == count else data, place)

    patch.setattr(reader, "_fill", fill)
    return calls


def test_every_read_may_fail(model, prune, tmp_path, monkeypatch):
    """The error names the shard, of the input or the output, and no work is lost."""
    prune = partial(prune, solver="magnitude")
    expected = digests(prune("whole"))
    shards = {path.name for path in model.glob("*.safetensors")}
    named: set[str] = set()
    count = 0
    while True:
        count += 1
        with monkeypatch.context() as patch:
            bad = OSError(errno.EIO, os.strerror(errno.EIO))
            calls = broken_reads(patch, count, bad)
            try:
                prune(f"out-{count}")
            except (CheckpointError, OutputError) as error:
                assert "Input/output error" in str(error)
                assert "the same command" in str(error)
                named |= {name for name in shards if f"model/{name}" in str(error)}
                assert ".safetensors" in str(error)
            if len(calls) < count:
                break
        assert not (tmp_path / f"out-{count}").exists()
        assert digests(prune(f"out-{count}")) == expected
    assert named == shards
    assert count > 20


@pytest.mark.parametrize("where", ["model", "out.partial"])
def test_a_shard_truncated_during_a_run(where, model, prune, tmp_path):
    """In the input it is an error that names it; in the output it is written again."""
    expected = digests(prune("whole"))
    original: dict[Path, bytes] = {}

    def cut(progress):
        if progress.block == 1 and progress.phase == "collecting" and not original:
            path = max((tmp_path / where).glob("*.safetensors"))
            original[path] = path.read_bytes()
            os.truncate(path, len(original[path]) // 2)
            raise Stopped

    with pytest.raises(Stopped):
        prune("out", progress=cut)
    ((path, data),) = original.items()
    if where == "model":
        with pytest.raises(CheckpointError, match=path.name):
            prune("out")
        status = path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        _set_times_as_recorded(path, tmp_path / "out.partial")
    assert digests(prune("out")) == expected


def _set_times_as_recorded(path: Path, partial: Path) -> None:
    """Set the recorded modification time of a restored file, as a backup does."""
    ledger = (partial / "ledger.jsonl").read_text()
    recorded = ledger.partition(f'"{path.name}": "')[2].partition('"')[0]
    modified = int(recorded.rpartition(" ")[2])
    os.utime(path, ns=(modified, modified))


def test_a_file_cut_between_header_and_data(model, monkeypatch):
    """Mapped, this would end in SIGBUS."""
    checkpoint = Checkpoint.open(model)
    name, info = next(iter(checkpoint.tensors.items()))
    real = reader._parse_header

    def parse_then_truncate(data):
        found = real(data)
        os.truncate(model / info.shard, 8 + 64)
        return found

    monkeypatch.setattr(reader, "_parse_header", parse_then_truncate)
    with pytest.raises(CheckpointError, match=rf"{info.shard} .* become shorter"):
        checkpoint.read([name])


def test_the_error_names_a_side_file_that_cannot_be_read(model, prune, monkeypatch):
    expected = digests(prune("whole"))
    real = Path.read_bytes

    def fail(path):
        if path == model / "tokenizer_config.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match=r"model/tokenizer_config\.json"):
            prune("out")
    assert digests(prune("out")) == expected


def test_a_committed_shard_that_cannot_be_read_is_written_again(
    prune, tmp_path, monkeypatch
):
    """A shard of an earlier run that the disk has lost costs no other work."""
    expected = digests(prune("whole"))
    with pytest.raises(Stopped):
        prune("out", progress=stop_at(6))
    lost = max((tmp_path / "out.partial").glob("*.safetensors"))
    real, calls = Path.open, []

    def fail(path, *arguments, **options):
        if path == lost and not calls:
            calls.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert digests(prune("out")) == expected
    assert calls


def test_tensors_are_read_as_stored(tmp_path):
    """For every dtype and shape, the same bytes as by the safetensors library.

    Of FP8 only what has scales is read (test_quantized_inputs.py).
    """
    generator = torch.Generator().manual_seed(0)
    octets = torch.randint(0, 2, (4 * 3 * 8,), generator=generator).to(torch.uint8)
    tensors = {
        f"{dtype}-{shape}": octets[: _bytes(dtype, shape)]
        .view(dtype)
        .reshape(shape)
        .clone()
        for dtype in reader.DTYPES.values()
        if "float8" not in str(dtype)
        for shape in ((4, 3), (5,), (), (0,), (2, 0))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    found = Checkpoint.open(tmp_path).read(tensors)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert (
            tensor.view(-1)
            .view(torch.uint8)
            .equal(expected[name].view(-1).view(torch.uint8))
        )


def _bytes(dtype, shape):
    return dtype.itemsize * torch.Size(shape).numel()
