"""A model that is sparse already: its zeros stay, whatever is done to it next."""

import json
import shutil
from typing import Any

import pytest
from safetensors.torch import load_file

import halve

# Name -> what is done to a 2:4 model; less sparsity than it has.
RUNS: dict[str, dict[str, Any]] = {
    "admm": {"sparsity": "30%", "solver": "admm"},
    "auto": {"sparsity": "30%"},
    "wanda, in order": {"sparsity": 0.1, "solver": "wanda", "sequential": True},
    "magnitude, in order": {"sparsity": 0.1, "solver": "magnitude", "sequential": True},
    "sparsegpt, more": {"sparsity": "60%", "solver": "sparsegpt"},
    "other groups": {"sparsity": "3:4", "solver": "sparsegpt"},
    "error": {"sparsity": "40%", "solver": "sparsegpt", "allocation": "error"},
    "int4": {"sparsity": 0, "quantize": "int4", "solver": "sparsegpt"},
    "int4, auto": {"sparsity": 0, "quantize": "int4"},
    "int2": {"sparsity": 0, "quantize": "int2", "solver": "sparsegpt"},
    "int2, nearest": {"sparsity": 0, "quantize": "int2", "solver": "magnitude"},
    "int3 with zero points": {"sparsity": 0, "quantize": "int3", "symmetric": False},
    "bits": {"target_bits": 3.0},
    "refined": {"sparsity": "20%", "solver": "wanda", "refine": True, "epochs": 1},
    "int2, refined": {"sparsity": 0, "quantize": "int2", "refine": True, "epochs": 1},
    "packed": {"sparsity": 0, "quantize": "int2", "packed": True},
}


def weights(folder, names):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name: found[name] for name in names}


@pytest.fixture(scope="module")
def sparse(pico, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "model"
    halve.prune(pico("llama"), out, sparsity="2:4", solver="magnitude")
    return out


@pytest.mark.parametrize("row", RUNS)
def test_zeros_of_a_sparse_model_stay(row, sparse, text, tmp_path):
    options = {"samples": 4, "seq_len": 32, "device": "cpu", "calibration": text}
    out = tmp_path / "out"
    record = halve.prune(sparse, out, **(options | RUNS[row]))
    if RUNS[row].get("packed"):
        halve.unpack(out, tmp_path / "dense")
        out = tmp_path / "dense"
    names = [m.tensor for block in record.blocks for m in block.matrices]
    before, after = weights(sparse, names), weights(out, names)
    for name in names:
        assert bool((after[name][before[name] == 0] == 0).all()), name
    if record.sparsity < 0.55:
        assert {m.pattern for m in halve.inspect(out).matrices} == {"2:4"}


def test_a_few_stray_zeros_are_weights_like_others(pico, tmp_path, text):
    """Otherwise a model with one would be pruned in another way than without it."""
    options = {"samples": 4, "seq_len": 32, "device": "cpu", "calibration": text}
    out = tmp_path / "out"
    halve.prune(pico("llama"), out, sparsity=0.005, solver="magnitude")
    record = halve.prune(out, tmp_path / "int2", sparsity=0, quantize="int2", **options)
    assert record.sparsity == 0


NOTE = {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"}
METHOD = {"quant_method": "compressed-tensors"}
# How compressed-tensors notes that a model whose weights are plain is sparse.
NOTES: dict[str, dict[str, Any]] = {
    "compression": {"compression_config": {"sparsity_config": NOTE}},
    "quantization": {
        "quantization_config": METHOD
        | {"format": "dense", "config_groups": {}, "sparsity_config": NOTE}
    },
    "null groups": {
        "quantization_config": METHOD | {"config_groups": None, "sparsity_config": NOTE}
    },
    "both": {
        "quantization_config": METHOD | {"sparsity_config": NOTE},
        "compression_config": {"sparsity_config": NOTE},
    },
    # What is read goes by the tensors: these are plain, whatever may be said of them.
    "no note": {"quantization_config": METHOD | {"format": "dense"}},
    "a mask": {
        "quantization_config": METHOD
        | {"sparsity_config": NOTE | {"format": "sparse-24-bitmask"}}
    },
    "groups": {
        "quantization_config": METHOD
        | {"sparsity_config": NOTE, "config_groups": {"group_0": {"bits": 4}}}
    },
}
COMPRESSED: dict[str, dict[str, Any]] = {
    "another format": {"sparsity_config": NOTE, "format": "pack-quantized"},
    "a list": {"sparsity_config": NOTE | {"format": ["dense"]}},
}


def described(folder, source, entries):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


@pytest.mark.parametrize("row", NOTES)
def test_a_note_of_sparsity_is_no_quantization(row, sparse, tmp_path):
    """The note does not go with an output, of which it says nothing true."""
    model = described(tmp_path / "model", sparse, NOTES[row])
    assert {m.pattern for m in halve.inspect(model).matrices} == {"2:4"}
    halve.pack(model, tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & config.keys()
    assert config == json.loads((sparse / "config.json").read_text())


@pytest.mark.parametrize("row", COMPRESSED)
def test_formats_that_are_not_read_are_refused(row, sparse, tmp_path):
    entries = {"quantization_config": METHOD | COMPRESSED[row]}
    model = described(tmp_path / "model", sparse, entries)
    with pytest.raises(halve.HalveError, match="quantized"):
        halve.inspect(model)
