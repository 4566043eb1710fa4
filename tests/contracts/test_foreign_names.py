"""Checkpoints that training code has saved are refused with what to do about them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.errors import CheckpointError
from halve.models.foreign_names import explain_names


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def compiled_blocks(tensors):
    """Rename as where each block was compiled on its own."""
    inner = "layers.0._orig_mod."
    return {name.replace("layers.0.", inner): t for name, t in tensors.items()}


def pruned_by_torch(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors.pop(name)
    return tensors | {f"{name}_orig": weight, f"{name}_mask": torch.ones_like(weight)}


def gptq(tensors):
    path = "model.layers.0.mlp.up_proj"
    del tensors[f"{path}.weight"]
    codes = torch.zeros(8, 128, dtype=torch.int32)
    return tensors | {f"{path}.qweight": codes, f"{path}.qzeros": codes.clone()}


def lora(tensors):
    path = "model.layers.0.mlp.up_proj"
    base = tensors.pop(f"{path}.weight")
    parts = {"base_layer.weight": base, "lora_A.weight": base[:4].clone()}
    parts["lora_B.weight"] = base[:, :4].clone()
    return tensors | {f"{path}.{name}": part for name, part in parts.items()}


# What renamed the tensors -> how, and what the message must say.
RENAMED = {
    "DDP": (renamed("module."), "model.module"),
    "torch.compile": (renamed("_orig_mod."), "_orig_mod with save_pretrained"),
    "compiled blocks": (compiled_blocks, "_orig_mod with save_pretrained"),
    "PEFT": (renamed("base_model.model."), "merge_and_unload"),
    "unmerged LoRA": (lora, "merge_and_unload"),
    "torch's pruning": (pruned_by_torch, "prune.remove"),
    "GPTQ without its config": (gptq, "made from"),
}


@pytest.mark.parametrize("row", RENAMED)
def test_the_remedy_is_that_of_the_names(row, pico, tmp_path):
    rename, remedy = RENAMED[row]
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    tensors = rename(load_file(model / "model.safetensors"))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensor for") as error:
        halve.inspect(model)
    assert remedy in error.value.remedy
    assert "config.json" not in error.value.remedy


def test_names_that_tell_nothing():
    assert explain_names(["a.weight", "module.b"], {"a.weight", "c"}) is None


CONTENTS = {
    "under another name": lambda tensors: {"model": tensors, "epoch": 3},
    "a step count": lambda tensors: tensors | {"step": 100},
    "an optimizer": lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}},
}


@pytest.mark.parametrize("row", CONTENTS)
def test_training_checkpoints_are_no_damage(row, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(CONTENTS[row](tensors), model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than the tensors of a model"):
        halve.inspect(model)
