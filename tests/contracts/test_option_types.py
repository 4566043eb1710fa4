"""Values of options: what stands for the declared type is taken, else refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import halve
from halve.errors import HalveError
from halve.options import (
    BenchOptions,
    EvalOptions,
    PackOptions,
    PruneOptions,
    RunOptions,
)

# Options class, value of a field -> what it becomes.
TAKEN: dict[str, tuple[type, dict[str, Any], object]] = {
    "a path": (PruneOptions, {"calibration": Path("a/b.txt")}, "a/b.txt"),
    "a path of a text": (EvalOptions, {"data": Path("b.txt")}, "b.txt"),
    "int64": (PruneOptions, {"samples": np.int64(4)}, 4),
    "int32, optional": (PruneOptions, {"seq_len": np.int32(32)}, 32),
    "a tensor": (PruneOptions, {"seed": torch.tensor(3)}, 3),
    "float32": (PruneOptions, {"damping": np.float32(0.5)}, 0.5),
    "an integer for a number": (PruneOptions, {"damping": 1}, 1.0),
    "a NumPy fraction": (PruneOptions, {"sparsity": np.float64(0.5)}, 0.5),
    "bool_": (PruneOptions, {"refit": np.True_}, True),
    "a device": (PruneOptions, {"device": torch.device("cpu")}, "cpu"),
    "a numbered device": (EvalOptions, {"device": torch.device("cuda", 1)}, "cuda:1"),
    "a list": (BenchOptions, {"batches": [1, np.int64(4)]}, (1, 4)),
    "an array": (BenchOptions, {"batches": np.array([2, 3])}, (2, 3)),
    "None": (RunOptions, {"memory": None}, None),
}
REFUSED: dict[str, tuple[type, dict[str, Any]]] = {
    "None": (PruneOptions, {"sparsity": None}),
    "no number": (PruneOptions, {"samples": None}),
    "a float for an integer": (PruneOptions, {"samples": 4.0}),
    "a text for an integer": (PruneOptions, {"samples": "4"}),
    "a truth for an integer": (PruneOptions, {"samples": True}),
    "a text for a number": (PruneOptions, {"damping": "0.01"}),
    "a truth for a number": (PruneOptions, {"sparsity": True}),
    "an integer for a truth": (PruneOptions, {"packed": 1}),
    "a text for a truth": (PruneOptions, {"refine": "no"}),
    "texts for a name": (PruneOptions, {"calibration": ["a", "b"]}),
    "a number for a name": (PruneOptions, {"solver": 3}),
    "a size": (RunOptions, {"memory": "8GiB"}),
    "a function that is none": (RunOptions, {"progress": None}),
    "one number for some": (BenchOptions, {"batches": 4}),
    "a text for numbers": (BenchOptions, {"batches": "14"}),
    "texts for numbers": (BenchOptions, {"batches": ["1"]}),
    "a list for a switch": (PackOptions, {"positive_zeros": []}),
    "a model for a text": (EvalOptions, {"data": torch.nn.Linear(1, 1)}),
}


@pytest.mark.parametrize("row", TAKEN)
def test_equal_values_of_other_types_are_taken(row):
    options, values, expected = TAKEN[row]
    (name,) = values
    found = getattr(options(**values), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("row", REFUSED)
def test_other_values_are_refused_by_name(row):
    options, values = REFUSED[row]
    (name,) = values
    with pytest.raises(HalveError, match=f"{name} is .*") as error:
        options(**values)
    assert f"Set {name} to" in str(error.value)


def test_options_of_any_type_are_json():
    """They are the identity of a run, which its ledger and its record hold."""
    values: dict[str, Any] = {
        "calibration": Path("a.txt"),
        "samples": np.int64(4),
        "damping": np.float32(0.5),
        "device": torch.device("cpu"),
    }
    options = PruneOptions(**values)
    plain = PruneOptions(calibration="a.txt", samples=4, damping=0.5, device="cpu")
    assert json.dumps(asdict(options)) == json.dumps(asdict(plain))


MODELS = [None, 7, torch.nn.Linear(1, 1), ["a"]]


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("verb", ["prune", "pack", "unpack", "inspect", "perplexity"])
def test_what_is_no_model_is_refused(verb, model, tmp_path):
    out = [tmp_path / "out"] if verb in {"prune", "pack", "unpack"} else []
    with pytest.raises(HalveError, match="The model is a "):
        getattr(halve, verb)(model, *out)


@pytest.mark.parametrize("out", [None, 7, "a\0b"])
def test_what_is_no_output_is_refused(out, pico):
    with pytest.raises(HalveError, match="not a valid folder name"):
        halve.prune(pico("llama"), out, solver="magnitude")
