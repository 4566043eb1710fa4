"""However a checkpoint is stored, the output has the tensor names of the input."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import halve
from halve.checkpoint import source
from halve.hub import check_on_hub

SPLIT = "model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"
SPLIT_BIN = "pytorch_model-{:05}-of-{:05}.bin", "pytorch_model.bin.index.json"


def _load(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _save(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def _shard(tensors, folder, names):
    """Distribute tensors over three files with an index."""
    pattern, index = names
    weight_map = {}
    for number in range(3):
        file = pattern.format(number + 1, 3)
        part = dict(list(tensors.items())[number::3])
        _save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _bin(tensors, folder):
    _save(tensors, folder / "pytorch_model.bin")


def _bin_of_parameters(tensors, folder):
    _bin({name: nn.Parameter(tensor) for name, tensor in tensors.items()}, folder)


def _bin_legacy(tensors, folder):
    """In the format that torch wrote before 1.6, which cannot be memory-mapped."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _bin_with_views(tensors, folder):
    """Tensors that are not contiguous."""
    views = {name: t.t().contiguous().t() for name, t in tensors.items()}
    _bin(views, folder)


STORAGES = {
    "safetensors in shards": lambda t, folder: _shard(t, folder, SPLIT),
    "bin": _bin,
    "bin in shards": lambda t, folder: _shard(t, folder, SPLIT_BIN),
    "bin of parameters": _bin_of_parameters,
    "legacy bin": _bin_legacy,
    "bin with views": _bin_with_views,
    "bin and safetensors": lambda t, folder: (
        _save(t, folder / "model.safetensors"),
        (folder / "pytorch_model.bin").write_bytes(b"not read"),
    ),
}
# Family -> prefix of the base model, which many checkpoints on the Hub omit.
PREFIXES = {"opt": "model.", "gpt2": "transformer.", "bloom": "transformer."}


def _stored_as(store, source, folder, prefix=""):
    """Copy a model, storing its weights with `store` and without a prefix."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(source, folder, ignore=ignored)
    tensors = _load(source)
    stored = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    store(stored, folder)
    return stored


def _pruned(folder, out, text):
    record = halve.prune(
        *(folder, out), calibration=str(text), samples=4, seq_len=16, device="cpu"
    )
    pruned = {m.tensor for block in record.blocks for m in block.matrices}
    return _load(out), pruned


def _check_loads(out):
    info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]  # pyright: ignore[reportIndexIssue]
    assert not any(info.values()), info


def _check_tensors(before, after, pruned):
    assert after.keys() == before.keys()
    weights = sum(after[name].numel() for name in pruned)
    assert sum(int((after[name] == 0).sum()) for name in pruned) == weights // 2
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in pruned:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_gives_the_same_output(storage, pico, text, tmp_path):
    source = pico("llama", dtype=torch.float16)
    before = _stored_as(STORAGES[storage], source, tmp_path / "stored")
    after, pruned = _pruned(tmp_path / "stored", tmp_path / "out", text)
    _check_tensors(before, after, pruned)
    _check_loads(tmp_path / "out")
    direct, _ = _pruned(source, tmp_path / "direct", text)
    assert all(torch.equal(direct[name], after[name]) for name in after)


@pytest.mark.parametrize("storage", ["bin", "safetensors in shards"])
@pytest.mark.parametrize("row", PREFIXES)
def test_names_without_the_base_models_prefix(row, storage, pico, text, tmp_path):
    prefix, source = PREFIXES[row], pico(row)
    store = STORAGES[storage]
    before = _stored_as(store, source, tmp_path / "stored", prefix)
    assert not any(name.startswith(prefix) for name in before)
    assert "lm_head.weight" not in before  # tied
    after, pruned = _pruned(tmp_path / "stored", tmp_path / "out", text)
    _check_tensors(before, after, pruned)
    assert len(pruned) >= 8
    _check_loads(tmp_path / "out")
    assert halve.inspect(tmp_path / "out").sparsity == 0.5


@pytest.mark.parametrize("factor", [1, 2], ids=["equal", "different"])
def test_both_names_of_a_tied_tensor(factor, pico, text, tmp_path):
    """torch.save stores both; transformers ties them only where they are equal."""

    def with_head(tensors, folder):
        tensors["lm_head.weight"] = (
            factor * tensors["model.decoder.embed_tokens.weight"]
        )
        _bin(tensors, folder)

    before = _stored_as(with_head, pico("opt"), tmp_path / "stored")
    before["lm_head.weight"] = factor * before["model.decoder.embed_tokens.weight"]
    after, pruned = _pruned(tmp_path / "stored", tmp_path / "out", text)
    _check_tensors(before, after, pruned)
    _check_loads(tmp_path / "out")


def test_tensors_that_the_model_does_not_have_are_copied(pico, text, tmp_path):
    """Old checkpoints contain attention masks and rotary frequencies."""

    def with_frequencies(tensors, folder):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.0.mask"] = torch.ones(2, 2, dtype=torch.bool)
        _save(tensors, folder / "model.safetensors")

    before = _stored_as(with_frequencies, pico("llama"), tmp_path / "stored")
    after, pruned = _pruned(tmp_path / "stored", tmp_path / "out", text)
    _check_tensors(before, after, pruned)


CUSTOM_CONFIG = """
from transformers import LlamaConfig

class CustomConfig(LlamaConfig):
    model_type = "custom"
"""
CUSTOM_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_custom import CustomConfig

class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_code_of_a_model_runs_only_if_trusted(pico, text, tmp_path, monkeypatch):
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    model = shutil.copytree(pico("llama"), tmp_path / "custom")
    (model / "configuration_custom.py").write_text(CUSTOM_CONFIG)
    (model / "modeling_custom.py").write_text(CUSTOM_MODEL)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_custom.CustomConfig",
            "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    arguments = {"calibration": str(text), "samples": 4, "seq_len": 16}
    with pytest.raises(halve.HalveError, match="--trust-remote-code"):
        halve.prune(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "modules").exists()
    halve.prune(model, tmp_path / "out", trust_remote_code=True, **arguments)
    assert (tmp_path / "out/modeling_custom.py").read_text() == CUSTOM_MODEL
    assert halve.inspect(tmp_path / "out", trust_remote_code=True).sparsity == 0.5


def test_the_hub_is_asked_once_for_a_model(tmp_path, monkeypatch):
    """By the check before torch is imported, and not again by the download."""
    asked = []

    class Api:
        def model_info(self, name: str, timeout: float) -> SimpleNamespace:
            asked.append(name)
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")])

    monkeypatch.setattr("halve.hub.HfApi", Api)
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(tmp_path))
    check_on_hub("nobody/such-a-model")
    assert source.resolve_model("nobody/such-a-model", weights=False) == tmp_path
    assert asked == ["nobody/such-a-model"]
