"""Sparsity allocated over blocks or matrices: exact, recorded, resumed, refused."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halve
from halve.errors import HalveError, TargetMissedError
from halve.patterns import Unstructured
from halve.pruning.allocate.search import AllocationSearch
from halve.records import PruneRecord
from tests.interruptions import Stopped, digests, stop_at


@pytest.fixture
def options(text) -> dict[str, Any]:
    return {
        "calibration": str(text),
        "samples": 8,
        "seq_len": 32,
        "device": "cpu",
        "sparsity": 0.6371,  # of no matrix a whole number of weights
        "solver": "sparsegpt",
        "allocation": "error",
    }


def changed(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return options | changes


def zeros_in(folder, record: PruneRecord) -> int:
    tensors: dict[str, torch.Tensor] = {}
    for file in record.shards:
        tensors |= load_file(folder / file)
    matrices = [m.tensor for block in record.blocks for m in block.matrices]
    return sum(int((tensors[name] == 0).sum()) for name in matrices)


def weights_of(record: PruneRecord) -> list[int]:
    return [sum(m.rows * m.columns for m in b.matrices) for b in record.blocks]


@pytest.mark.parametrize(
    ("solver", "family"),
    [("auto", "llama"), ("wanda", "gpt2"), ("magnitude", "llama"), ("admm", "opt")],
)
def test_the_whole_model_has_the_sparsity_to_one_weight(
    solver, family, pico, options, tmp_path
):
    options = changed(options, solver=solver)
    record = halve.prune(pico(family), tmp_path / "out", **options)
    weights = weights_of(record)
    total = Unstructured(0.6371).count(sum(weights))
    assert zeros_in(tmp_path / "out", record) == total
    assert record.allocation is not None
    # The total is rounded down first: each block has its exact part of that, rounded.
    claims = [
        sparsity * size
        for sparsity, size in zip(record.allocation.sparsities, weights, strict=True)
    ]
    for block, claim in zip(record.blocks, claims, strict=True):
        assert abs(block.zeros - total * claim / sum(claims)) < 1


def test_the_record_has_all_trials_and_the_least_divergence_wins(
    pico, options, tmp_path
):
    out = tmp_path / "out"
    record = halve.prune(pico("llama"), out, **options)
    assert PruneRecord.from_json((out / "halve.json").read_text()) == record
    found = record.allocation
    assert found is not None
    assert len(found.errors) == len(record.blocks)
    first, *others = found.trials
    assert first.strength == 0
    assert set(first.sparsities) == {0.6371}
    assert others
    best = min(found.trials, key=lambda trial: trial.divergence)
    assert (found.strength, found.sparsities) == (best.strength, best.sparsities)


def test_where_nothing_is_better_it_stays_uniform(pico, options, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.pruning.allocate.search.mean_divergence", lambda *_: 1.0)
    out = tmp_path / "out"
    record = halve.prune(pico("llama"), out, **options)
    assert record.allocation is not None
    assert record.allocation.strength == 0
    assert len(record.allocation.trials) == 2
    assert all(abs(b.zeros - 0.6371 * w) <= 1 for b, w in _with_weights(record))


def _with_weights(record):
    return zip(record.blocks, weights_of(record), strict=True)


def test_what_helps_is_taken(pico, options, tmp_path, monkeypatch):
    """The last trial is chosen if the divergence falls from trial to trial."""
    divergences = iter([4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(
        "halve.pruning.allocate.search.mean_divergence", lambda *_: next(divergences)
    )
    out = tmp_path / "out"
    record = halve.prune(pico("llama"), out, **options)
    found = record.allocation
    assert found is not None
    assert (
        found.strength
        == found.trials[-1].strength
        == max(trial.strength for trial in found.trials)
    )
    pairs = sorted(zip(found.errors, (b.sparsity for b in record.blocks), strict=True))
    assert pairs[0][1] > pairs[-1][1]


def test_a_resumed_run_does_not_search_again(pico, options, tmp_path, monkeypatch):
    phases = []
    whole = halve.prune(
        pico("llama"), tmp_path / "whole", progress=phases.append, **options
    )
    first = [step.phase for step in phases].index("collecting") + 1
    with pytest.raises(Stopped):
        halve.prune(pico("llama"), tmp_path / "out", progress=stop_at(first), **options)
    monkeypatch.delattr(AllocationSearch, "choose")
    record = halve.prune(pico("llama"), tmp_path / "out", **options)
    assert record.allocation == whole.allocation
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_disk_or_the_memory_makes_no_difference(pico, options, tmp_path):
    first = halve.prune(pico("llama"), tmp_path / "a", **options)
    second = halve.prune(pico("llama"), tmp_path / "b", activation_memory=0, **options)
    assert first.allocation == second.allocation
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_missed_budget_is_refused(pico, options, tmp_path, monkeypatch):
    """Zeros that are rounded down in each matrix are too few in the whole model."""
    monkeypatch.setattr(
        "halve.pruning.decisions.exact_patterns",
        lambda plan, _: [{} for _ in plan.layout.blocks],
    )
    with pytest.raises(TargetMissedError, match="in the whole model"):
        halve.prune(pico("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sparsity": "2:4"}, "2:4 prunes all blocks alike"),
        ({"allocation": "owl"}, "no allocation 'owl'"),
        ({"samples": 1}, "held out"),
    ],
)
def test_what_cannot_be_allocated_is_refused(changes, match, pico, options, tmp_path):
    options = changed(options, **changes)
    with pytest.raises(HalveError, match=match):
        halve.prune(pico("llama"), tmp_path / "out", **options)


BY_IMPORTANCE: dict[str, dict[str, Any]] = {
    "auto": {"solver": "auto", "allocation": "auto"},
    "admm": {"solver": "admm", "allocation": "importance"},
    "sparsegpt": {"solver": "sparsegpt", "allocation": "importance"},
    "magnitude": {"solver": "magnitude", "allocation": "importance"},
    "int4": {"solver": "auto", "allocation": "auto", "quantize": "int4"},
}


@pytest.mark.parametrize("row", BY_IMPORTANCE)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_importance_the_whole_model_has_the_sparsity_to_one_weight(
    row, family, pico, options, tmp_path
):
    options = changed(options, **BY_IMPORTANCE[row])
    if "quantize" in options:
        options["group_size"] = 32
    record = halve.prune(pico(family), tmp_path / "out", **options)
    matrices = [m for block in record.blocks for m in block.matrices]
    total = Unstructured(0.6371).count(sum(weights_of(record)))
    zeros = zeros_in(tmp_path / "out", record)
    assert zeros == total or (row == "int4" and zeros > total)  # some round to zero
    sparsities = [m.sparsity for m in matrices]
    assert max(sparsities) - min(sparsities) > 0.02
    for each in sparsities:
        assert 0.6371 / 2 - 1e-3 <= each <= (1 + 0.6371) / 2 + 1e-3
    assert halve.verify(tmp_path / "out").sound


def test_rules_come_first_and_the_rest_has_the_sparsity(pico, options, tmp_path):
    rules: dict[str, Any] = {"rules": ("q_proj=30%",), "skip": (r"layers\.1\.mlp",)}
    options = changed(options, **BY_IMPORTANCE["auto"], **rules)
    record = halve.prune(pico("llama"), tmp_path / "out", **options)
    matrices = [m for block in record.blocks for m in block.matrices]
    left = {m.tensor: m for m in matrices}
    for name in list(left):
        if "q_proj" in name:
            assert left.pop(name).sparsity == pytest.approx(0.3, abs=1e-3)
        elif "layers.1.mlp" in name:
            assert left.pop(name).sparsity == 0
    sizes = {name: m.rows * m.columns for name, m in left.items()}
    zeros = sum(round(m.sparsity * sizes[name]) for name, m in left.items())
    assert zeros == Unstructured(0.6371).count(sum(sizes.values()))


def test_a_resumed_run_takes_the_zeros_that_it_decided_on(
    pico, options, tmp_path, monkeypatch
):
    options = changed(options, **BY_IMPORTANCE["auto"])
    phases = []
    halve.prune(pico("llama"), tmp_path / "whole", progress=phases.append, **options)
    first = [step.phase for step in phases].index("collecting") + 1
    with pytest.raises(Stopped):
        halve.prune(pico("llama"), tmp_path / "out", progress=stop_at(first), **options)
    monkeypatch.setattr(
        "halve.pruning.decisions.zeros_by_saliency", lambda *_: pytest.fail("again")
    )
    halve.prune(pico("llama"), tmp_path / "out", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_importance_is_refused_where_it_is_not_measured(pico, options, tmp_path):
    options = changed(options, allocation="importance")
    with pytest.raises(HalveError, match="mixture of experts"):
        halve.prune(pico("mixtral"), tmp_path / "out", **options)
    with pytest.raises(HalveError, match="importance_samples is 0"):
        halve.prune(pico("llama"), tmp_path / "out", importance_samples=0, **options)


def test_uniform_is_the_default_and_records_no_allocation(pico, options, tmp_path):
    options = changed(options, allocation="uniform")
    record = halve.prune(pico("llama"), tmp_path / "a", **options)
    options.pop("allocation")
    halve.prune(pico("llama"), tmp_path / "b", **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert record.allocation is None
    assert json.loads((tmp_path / "a/halve.json").read_text())["allocation"] is None
    for matrix in (m for block in record.blocks for m in block.matrices):
        size = matrix.rows * matrix.columns
        assert round(matrix.sparsity * size) == Unstructured(0.6371).count(size)
