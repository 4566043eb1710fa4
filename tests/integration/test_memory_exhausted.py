"""Out of memory on a device: half of the batch, with a warning, also when resumed."""

import re
import warnings
from typing import Any

import pytest
import torch

import halve
from halve.errors import HalveError, HalveWarning
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.stream import Stream
from tests.interruptions import STOPPED, Stopped, digests, stop_at

OPTIONS = {"samples": 8, "seq_len": 32, "device": "cpu"}
ROWS = ("magnitude", "sparsegpt", "refined", "allocated, packed")


@pytest.fixture
def prune(pico, text, tmp_path):
    def run(row, name, **options):
        asked: dict[str, Any] = (
            OPTIONS | {"calibration": str(text)} | STOPPED[row] | options
        )
        halve.prune(pico("llama"), tmp_path / name, **asked)
        return tmp_path / name

    return run


def exhausted_by(patch, samples: int, first_block: int = 0) -> None:
    """Raise OutOfMemoryError for batches of more than so many samples."""
    real = Stream.run

    def run(stream, block, index, part, hidden=None):
        if part.stop - part.start > samples and index >= first_block:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(stream, block, index, part, hidden)

    patch.setattr(Stream, "run", run)


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HalveWarning)
        call()
    return [str(w.message) for w in caught if w.category is HalveWarning]


@pytest.mark.parametrize("row", ROWS)
def test_a_smaller_batch_is_used_with_a_warning(row, prune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseModel, "batch_tokens", 64)
        defaults: Any = BlockwiseModel.__init__.__defaults__
        patch.setattr(BlockwiseModel.__init__, "__defaults__", (64, *defaults[1:]))
        expected = digests(prune(row, "small"))
    with monkeypatch.context() as patch:
        exhausted_by(patch, 2)
        said = warned(lambda: prune(row, "out"))
    if row == "magnitude":  # it runs nothing
        assert said == []
    else:
        sizes = [re.findall(r"retrying with (\d+) tokens", line) for line in said]
        assert sizes == [["512"], ["256"], ["128"], ["64"]]
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("row", ROWS[1:])
def test_a_resumed_run_uses_the_smaller_batch(row, prune, tmp_path, monkeypatch):
    """Even if memory is free again: a larger batch would end in other bytes."""
    with monkeypatch.context() as patch:
        exhausted_by(patch, 2, first_block=1)
        phases = []
        warned(lambda: prune(row, "whole", progress=phases.append))
        with pytest.raises(Stopped):
            warned(lambda: prune(row, "out", progress=stop_at(len(phases) - 1)))
    assert warned(lambda: prune(row, "out")) == []
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_batch_has_at_least_one_window(prune, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        exhausted_by(patch, 0)
        with pytest.raises(HalveError, match=r"one window of 32 tokens. Pass a short"):
            warned(lambda: prune("sparsegpt", "out"))
    assert not (tmp_path / "out").exists()


def test_evaluation_uses_a_smaller_batch_too(pico, text, monkeypatch):
    evaluate = {"data": str(text), "seq_len": 32, "segments": 8, "device": "cpu"}
    whole = halve.perplexity(pico("llama"), **evaluate)
    exhausted_by(monkeypatch, 2)
    found = []
    said = warned(lambda: found.append(halve.perplexity(pico("llama"), **evaluate)))
    assert len(said) == 4
    assert found[0].perplexity == pytest.approx(whole.perplexity, rel=1e-5)
