"""`--target-bits`: mixes of zeros and grids, tried on the whole model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halve
from halve.pruning.allocate import mixes
from halve.records import PruneRecord

TARGET = 3.3
# Zeros and each of four grids, int2 without zeros, and two blends.
TRIALS = 7
OPTIONS = {
    "solver": "sparsegpt",
    "target_bits": TARGET,
    "group_size": 32,
    "samples": 8,
    "seq_len": 32,
}


@pytest.fixture
def options(text):
    return OPTIONS | {"calibration": str(text)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mix_of_least_divergence_is_taken(pico, options, tmp_path, family):
    out = tmp_path / "out"
    record = halve.prune(pico(family), out, **options)
    assert PruneRecord.from_json((out / "halve.json").read_text()) == record
    assert record.mix is not None
    assert halve.verify(out).sound
    names = [trial.name for trial in record.mix.trials]
    assert len(set(names)) == len(names)
    assert {"int2m and int3 by error", "int2m and int3 by place"} < set(names)
    assert all(trial.bits <= TARGET + 1e-9 for trial in record.mix.trials)
    best = min(record.mix.trials, key=lambda trial: trial.divergence)
    assert (record.mix.name, record.mix.bits) == (best.name, best.bits)


@pytest.mark.parametrize(
    "chosen",
    [pytest.param(i, marks=pytest.mark.slow if i % 2 else ()) for i in range(TRIALS)],
)
def test_every_matrix_gets_what_the_mix_says(
    pico, options, tmp_path, monkeypatch, chosen
):
    """Each trial in turn diverges least."""
    divergences = iter(float(index != chosen) for index in range(TRIALS))
    monkeypatch.setattr(mixes, "mean_divergence", lambda *_: next(divergences))
    record = halve.prune(pico("llama"), tmp_path / "out", **options)
    found = record.mix
    assert found is not None
    assert found.name == found.trials[chosen].name
    for matrix, index in zip(record.all_matrices, found.matrices, strict=True):
        pair = found.pairs[index]
        assert matrix.grid is not None
        assert matrix.grid["bits"] == pair.grid["bits"]
        # Weights that are rounded to zero are zeros as well.
        assert matrix.sparsity >= pair.sparsity - 0.001
    assert record.bits is not None
    assert record.bits <= found.bits + 0.001


def test_outer_blocks_get_the_finer_grid(pico, options, tmp_path, monkeypatch):
    divergences = iter(float(index != TRIALS - 1) for index in range(TRIALS))
    monkeypatch.setattr(mixes, "mean_divergence", lambda *_: next(divergences))
    record = halve.prune(pico("llama"), tmp_path / "out", **options)
    assert record.mix is not None
    assert record.mix.name.endswith("by place")
    bits = [
        [m.grid["bits"] for m in block.matrices if m.grid is not None]
        for block in record.blocks
    ]
    means = [sum(of_block) / len(of_block) for of_block in bits]
    assert means[0] == 3
    assert means[len(means) // 2] < 3
    assert {bit for of_block in bits for bit in of_block} == {2, 3}


def test_a_resumed_run_does_not_search_again(pico, options, tmp_path, monkeypatch):
    def stop(progress):
        if progress.block == 1 and progress.phase == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve.prune(pico("llama"), tmp_path / "out", **options, progress=stop)
    monkeypatch.setattr(mixes.MixSearch, "choose", lambda _: pytest.fail("searched"))
    resumed = halve.prune(pico("llama"), tmp_path / "out", **options)
    monkeypatch.undo()
    whole = halve.prune(pico("llama"), tmp_path / "whole", **options)
    assert resumed.shards == whole.shards
    assert resumed.mix == whole.mix


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=30),
    st.integers(0, 400),
)
def test_a_room_is_filled_by_worth(matrices, room):
    worth, sizes = [list(column) for column in zip(*matrices, strict=True)]
    chosen = mixes._fill(worth, sizes, room)
    left = room - sum(sizes[index] for index in chosen)
    assert left >= 0
    # Whatever was left out did not fit beside what is worth more.
    for index in set(range(len(sizes))) - chosen:
        more = sum(sizes[i] for i in chosen if worth[i] >= worth[index])
        assert more + sizes[index] > room


def test_blends_lie_between_two_grids():
    from halve.grids import BITS, QuantScheme, grids_around  # noqa: PLC0415

    assert grids_around(2.0, 128, symmetric=True) is None
    assert grids_around(8.125, 128, symmetric=True) is None
    for target in torch.linspace(2.2, 8.1, 50).tolist():
        found = grids_around(target, 128, symmetric=True)
        assert found is not None
        low, high = found
        assert low.bits_per_weight(0) <= target < high.bits_per_weight(0)
        between = [b for b in BITS if low.bits < b < high.bits]
        assert not between
        assert low == QuantScheme(low.bits).without_zero()
