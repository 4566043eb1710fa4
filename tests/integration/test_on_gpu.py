"""A whole run on a GPU that is not there: no device is mixed with another."""

from typing import Any

import pytest
import torch

import halve
from halve.checkpoint import Checkpoint
from halve.pruning import loop, run
from halve.solvers import quantized, sweep
from tests.fake_gpu import fake_gpu

SIZES: dict[str, Any] = {"samples": 16, "seq_len": 64}
WAYS: dict[str, dict[str, Any]] = {
    "without text, packed": {
        **{"solver": "magnitude", "quantize": "int3", "symmetric": False},
        **{"quantize_head": "int8", "packed": True},
    },
    "packed": {"solver": "sparsegpt", "packed": True, **SIZES},
    "codes, packed": {
        **{"solver": "sparsegpt", "quantize": "int4", "packed": True},
        **SIZES,
    },
    "codes, tuned": {
        **{"solver": "sparsegpt", "quantize": "int2", "refine": True, "epochs": 1},
        **SIZES,
    },
    "2:4, refitted": {"solver": "wanda", "refit": True, "sparsity": "2:4", **SIZES},
    "allocated": {"solver": "sparsegpt", "allocation": "error", **SIZES},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_gives_what_it_gives_on_the_cpu(way, pico, text, tmp_path, monkeypatch):
    for module in (sweep, quantized):  # the interpreter of its kernels takes long
        monkeypatch.setattr(module, "has_triton", lambda device: False)
    for module in (loop, run):  # in threads devices are not watched
        monkeypatch.setattr(module, "overlaps_files", lambda run: False)
    source = pico("llama", dtype=torch.bfloat16)
    options: dict[str, Any] = dict(WAYS[way])
    if "samples" in options:
        options["calibration"] = str(text)
    halve.prune(source, tmp_path / "cpu", device="cpu", **options)
    with fake_gpu():
        record = halve.prune(source, tmp_path / "gpu", device="cuda", **options)
    expected, found = (Checkpoint.open(tmp_path / name) for name in ("cpu", "gpu"))
    for matrix in [m.tensor for block in record.blocks for m in block.matrices]:
        first, second = (c.read([matrix])[matrix] for c in (expected, found))
        assert ((first == 0) == (second == 0)).double().mean() >= 0.98, matrix
