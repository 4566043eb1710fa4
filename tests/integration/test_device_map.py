"""Packed models whose modules accelerate places on several devices.

Two GPUs are stood in for by the CPU and the disk, between which accelerate's hooks move
tensors as they do between GPUs.
"""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import halve

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
QUANTIZED = {"bitmask": None, "codes": "int4", "dense codes": "int8"}


def packed(pico, tmp_path, row, kind):
    sparsity = 0 if kind == "dense codes" else "50%"
    options: dict[str, Any] = {"quantize": QUANTIZED[kind], "sparsity": sparsity}
    halve.prune(pico(row), tmp_path / "p", solver="magnitude", packed=True, **options)
    return tmp_path / "p"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def split(model, blocks: str) -> dict[str, str]:
    """Return a map that puts the first block on the CPU and the second on the disk."""
    rest = (
        name
        for name, module in model.named_modules()
        if name and not name.startswith(blocks) and not list(module.children())
    )
    return dict.fromkeys(rest, "cpu") | {f"{blocks}.0": "cpu", f"{blocks}.1": "disk"}


# transformers cannot offload gpt2 with codes: it initialises its `c_proj` once more.
@pytest.mark.parametrize(("row", "kind"), [
    ("llama", "bitmask"),
    ("llama", "codes"),
    ("llama", "dense codes"),
    ("gpt2", "bitmask"),
])  # fmt: skip
def test_a_split_model_computes_the_same(row, kind, pico, tmp_path):
    folder = packed(pico, tmp_path, row, kind)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=split(plain, BLOCKS[row]),
        offload_folder=tmp_path / "offloaded",
    )
    weights = {parameter.device.type for parameter in model.parameters()}
    assert weights == {"cpu", "meta"}
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), logits(plain))  # moved there and back


@pytest.mark.parametrize("memory", [None, 800_000])
def test_an_automatic_map_counts_packed_bytes(memory, pico, tmp_path):
    folder = packed(pico, tmp_path, "llama", "bitmask")
    limits = {} if memory is None else {"max_memory": {"cpu": memory}}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", offload_folder=tmp_path / "offloaded", **limits
    )
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    assert offloaded == (memory is not None)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(plain))
