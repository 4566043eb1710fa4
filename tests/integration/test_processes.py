"""Packed models in other processes: forked, pickled, and as wide as asked for."""

import os
import pickle
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halve

IDS = torch.arange(5, 15)[None]
KINDS = {"bitmask": {}, "int4": {"sparsity": 0, "quantize": "int4"}}
over_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def packed(pico, tmp_path_factory):
    """Return a function from a kind of packed matrices to a model that has them."""
    folder = tmp_path_factory.mktemp("packed")

    def make(kind: str) -> Path:
        if not (folder / kind).exists():
            options = {"solver": "magnitude", "packed": True, "group_size": 32}
            if kind == "bitmask":
                del options["group_size"]
            # A tied head, and one of its own, share or have quantized tensors.
            halve.prune(pico("llama"), folder / kind, **(options | KINDS[kind]))
        return folder / kind

    return make


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@over_kinds
def test_a_packed_model_is_pickled(kind, packed):
    model = load(packed(kind))
    expected = logits(model)
    for again in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        assert torch.equal(logits(again), expected)
        for (name, one), (_, other) in zip(
            model.named_buffers(), again.named_buffers(), strict=True
        ):
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name
    assert torch.equal(logits(model), expected)  # as it was


@over_kinds
def test_a_packed_model_is_loaded_in_float64(kind, packed):
    expected = logits(load(packed(kind)))
    wide = load(packed(kind), dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert torch.allclose(logits(wide).float(), expected, atol=1e-4)
    assert torch.allclose(
        logits(load(packed(kind)).double()).float(), expected, atol=1e-4
    )


FORKING = """
import os, sys
import halve, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
before = torch.get_num_threads()
if os.fork() == 0:
    with torch.no_grad():
        model(torch.arange(5, 10)[None])
    os._exit(0)
_, status = os.wait()
sys.exit(status or before != 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork and OpenMP of GNU")
def test_a_process_may_load_and_then_fork(packed):
    """As gunicorn does with --preload: OpenMP's threads would be lost in the child."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    words = [sys.executable, "-c", FORKING, str(packed("bitmask"))]
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        pytest.fail("the child waits for threads that it does not have")
    assert process.returncode == 0
