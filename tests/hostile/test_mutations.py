"""Randomly changed files: a command succeeds or raises HalveError, nothing else."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import halve
from halve.options import PruneOptions
from halve.plan import make_plan
from tests.hostile import spoilers as by

few = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Replacements for a number or a string; no size that would be allocated.
values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 63, 2**31, 2**63, 2**100, 0.5, 1e308]),
    st.sampled_from(["", "a", "64", "gelu", "llama", "opt", "float16", "../a"]),
    st.sampled_from([[], {}, [0], [[]], {"a": 1}, [-1, -1], ["a"]]),
)
edits = st.lists(
    st.tuples(st.integers(0, 2**32), st.sampled_from(b'\0{}[]",:-019eE\xffxmt.')),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="session")
def good(pico) -> dict[str, bytes]:
    """Return the files of a sharded model, by name."""
    folder = pico("llama", hidden_size=16, intermediate_size=32, vocab_size=64)
    stored = {"config.json": "config.json", by.SHARD: by.WEIGHTS}
    files = {name: (folder / old).read_bytes() for name, old in stored.items()}
    names = load_file(folder / by.WEIGHTS)
    weight_map = dict.fromkeys(names, by.SHARD)
    files[by.INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


@pytest.fixture
def survives(good, tmp_path) -> Callable[[str, bytes], None]:
    """Return a function that inspects and plans the model with one file replaced."""
    for name, contents in good.items():
        (tmp_path / name).write_bytes(contents)

    def inspect_and_plan(name: str, contents: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(contents)
        for verb in (halve.inspect, _plan):
            try:
                verb(tmp_path)
            except halve.HalveError as error:
                assert error.problem.endswith(".")
                assert error.remedy.endswith((".", "..."))
        path.write_bytes(good[name])

    return inspect_and_plan


def _plan(folder: Path) -> object:
    return make_plan(folder, PruneOptions(seq_len=8))


def _edited(contents: bytes, changes: list[tuple[int, int]]) -> bytes:
    edited = bytearray(contents)
    for place, value in changes:
        edited[place % len(edited)] = value
    return bytes(edited)


@few
@given(edits)
def test_bytes_of_the_header(survives, good, changes):
    weights = good[by.SHARD]
    (size,) = struct.unpack("<Q", weights[:8])
    header = _edited(weights[: 8 + size], changes)
    survives(by.SHARD, header + weights[8 + size :])


@few
@given(edits)
def test_bytes_of_the_index(survives, good, changes):
    survives(by.INDEX, _edited(good[by.INDEX], changes))


@few
@given(edits)
def test_bytes_of_the_config(survives, good, changes):
    survives("config.json", _edited(good["config.json"], changes))


@few
@given(st.integers(0, 100), values)
def test_values_of_the_config(survives, good, place, value):
    config = json.loads(good["config.json"])
    config[list(config)[place % len(config)]] = value
    survives("config.json", json.dumps(config).encode())


@few
@given(st.integers(0, 100), st.sampled_from(["dtype", "shape", "data_offsets"]), values)
def test_values_of_the_header(survives, good, place, key, value):
    weights = good[by.SHARD]
    (size,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[place % len(names)]][key] = value
    text = json.dumps(header).encode()
    contents = struct.pack("<Q", len(text)) + text + weights[8 + size :]
    survives(by.SHARD, contents)
