"""What the dry run foretells, and what `--memory` makes of it."""

import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import halve
from halve.errors import HalveError
from halve.options import PruneOptions
from halve.plan import make_plan
from halve.pruning import MemoryPlan, forecast_run, plan_memory
from halve.pruning import loop as loop_module
from halve.pruning import prune_block as block_module
from halve.pruning.memory import forecast as forecast_module
from tests.tables import FAMILIES, MIXTURES, SOLVERS

SIZES: dict[str, Any] = {"samples": 64, "seq_len": 128}


@pytest.mark.parametrize("row", FAMILIES)
def test_every_family_has_a_forecast(row, pico):
    found = forecast_run(make_plan(pico(row), PruneOptions(**SIZES)))
    assert found.largest.bytes > 0
    assert found.peak == found.process + found.resident + found.largest.bytes
    assert found.operations > 0


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_more_work_takes_more(solver, pico):
    model = pico("llama")
    rows: list[dict[str, Any]] = [
        {"samples": 64, "seq_len": 32},
        SIZES,
        SIZES | {"refine": True},
        SIZES | {"refine": True, "epochs": 9},
    ]
    few, many, refined, longer = (
        forecast_run(make_plan(model, PruneOptions(solver=solver, **options)), 2**40)
        for options in rows
    )
    assert few.resident <= many.resident <= refined.resident
    assert few.operations <= many.operations < refined.operations < longer.operations
    assert many.largest.bytes <= refined.largest.bytes


def test_a_limit_decides_where_hidden_states_live(pico):
    plan = make_plan(pico("llama"), PruneOptions(**SIZES))
    least = forecast_run(plan, 0)
    assert least.resident == 0
    assert least.mapped > 0
    assert least.disk == least.output + least.mapped
    roomy = plan_memory(plan, least.peak + 2**30, None)
    assert forecast_run(plan, roomy.activations).mapped == 0
    tight = plan_memory(plan, least.peak + 2**26, None)
    assert forecast_run(plan, min(tight.activations, 2**10)).mapped == least.mapped
    assert plan_memory(plan, least.peak + 2**30, 5) == MemoryPlan(5)


def test_a_limit_that_cannot_hold_is_refused_with_what_takes_most(pico, text, tmp_path):
    with pytest.raises(HalveError, match="of memory are needed"):
        halve.prune(
            pico("opt"),
            tmp_path / "out",
            calibration=str(text),
            samples=4,
            seq_len=32,
            memory=2**20,
        )
    assert not (tmp_path / "out").exists()


def test_a_limit_moves_hidden_states_and_changes_no_byte(
    pico, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(forecast_module, "_resident", lambda: 0)
    options: dict[str, Any] = {"samples": 8, "seq_len": 64}
    least = forecast_run(make_plan(pico("opt"), PruneOptions(**options)), 0).peak
    files: list[object] = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **kw: files.append(kw) or make(**kw)
    )
    options["calibration"] = str(text)
    halve.prune(pico("opt"), tmp_path / "free", memory=2 * least, **options)
    assert not files
    halve.prune(pico("opt"), tmp_path / "tight", memory=least + 99, **options)
    assert files
    for file in sorted((tmp_path / "free").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "tight" / file.name).read_bytes()


WIDE = {"opt": {"ffn_dim": 1024}, "llama": {"intermediate_size": 1024}}


def test_a_tight_limit_sets_the_widest_inputs_aside(pico, monkeypatch):
    monkeypatch.setattr(forecast_module, "_resident", lambda: 0)
    plan = make_plan(
        pico("opt", **WIDE["opt"]), PruneOptions(**SIZES, solver="sparsegpt")
    )
    together, held_out = (forecast_run(plan, 0, deferred) for deferred in (False, True))
    assert held_out.mapped == together.mapped + 4 * plan.tokens * 1024
    assert held_out.peak < together.peak
    assert plan_memory(plan, held_out.peak, None) == MemoryPlan(0, deferred=True)
    assert plan_memory(plan, together.peak, None) == MemoryPlan(0, deferred=True)
    assert plan_memory(plan, together.peak * 10 // 9 + 9, None).deferred is False
    with pytest.raises(HalveError, match="of memory are needed"):
        plan_memory(plan, held_out.peak - 1, None)


def test_a_tenth_of_a_limit_is_kept_free_where_that_can_be(pico, monkeypatch):
    monkeypatch.setattr(forecast_module, "_resident", lambda: 0)
    plan = make_plan(pico("opt"), PruneOptions(**SIZES, solver="sparsegpt"))
    least = forecast_run(plan, 0).peak
    left = plan_memory(plan, 2 * least, None).activations
    assert left == pytest.approx(0.8 * least, rel=0.01)
    assert plan_memory(plan, least + 2**20, None).activations == 0


@pytest.mark.parametrize("row", WIDE)
@pytest.mark.parametrize("options", [
    {"solver": "sparsegpt"},
    {"solver": "auto", "sequential": False},
    {"solver": "sparsegpt", "refine": True, "epochs": 1},
    {"solver": "sparsegpt", "allocation": "error"},
], ids=str)  # fmt: skip
def test_inputs_set_aside_change_no_byte(
    row, options, pico, text, tmp_path, monkeypatch
):
    model, summed = pico(row, **WIDE[row]), []
    sizes: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text)}
    accumulate_deferred = block_module.accumulate_deferred

    def watched(state, group, *rest):
        summed.append(group.leader)
        return accumulate_deferred(state, group, *rest)

    monkeypatch.setattr(block_module, "sum_up", watched)
    halve.prune(model, tmp_path / "together", **sizes, **options)
    assert not summed
    monkeypatch.setattr(
        loop_module, "make_room", lambda *_: MemoryPlan(2**30, deferred=True)
    )
    halve.prune(model, tmp_path / "apart", **sizes, **options)
    assert set(summed) == {"fc2" if row == "opt" else "mlp.down_proj"}
    for file in sorted((tmp_path / "together").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "apart" / file.name).read_bytes()


# admm corrects targets, for which the dense matrices of a group stay.
@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {"admm"}))
def test_a_dense_matrix_is_gone_before_its_solution_is_checked(
    solver, pico, text, tmp_path, monkeypatch
):
    dense: list[StorageWeakRef] = []
    gone: list[bool] = []
    select, is_finite = block_module._select, block_module.is_finite

    def selected(candidates, stored, *rest):
        dense.append(StorageWeakRef(stored.untyped_storage()))
        return select(candidates, stored, *rest)

    def checked(rounded):
        gone.append(dense[-1].expired())
        return is_finite(rounded)

    monkeypatch.setattr(block_module, "_select", selected)
    monkeypatch.setattr(block_module, "is_finite", checked)
    sizes: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text)}
    model = pico("opt", dtype=torch.bfloat16)
    halve.prune(model, tmp_path / "out", solver=solver, **sizes)
    assert len(gone) == len(dense) > 0
    assert all(gone)


def test_scores_of_attention_count_where_they_lie_in_memory(pico):
    plans = [make_plan(pico(row), PruneOptions(**SIZES)) for row in ("bloom", "opt")]
    assert [plan.scored_heads for plan in plans] == [4, 0]
    bloom = plans[0]
    fused = replace(bloom, scored_heads=0)
    scored, other = (
        forecast_run(plan, 0).by_name()["collecting"]["activations"]
        for plan in (bloom, fused)
    )
    inner = 4 * bloom.width
    assert scored - other == 4 * 1024 * 3 * (4 * 128 - inner)


_HOLES = """
from pathlib import Path
import os
import torch
from halve.runtime.malloc_trim import malloc_trim

def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")

torch.ones(2**22)  # freed, it raises glibc's threshold for what it keeps
many = [torch.ones(2**20) for _ in range(32)]
last = torch.ones(2**20)
del many
before = resident()
malloc_trim()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory")
def test_what_was_freed_is_handed_back():
    command = [sys.executable, "-c", _HOLES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20


@pytest.mark.parametrize("row", FAMILIES)
def test_a_config_alone_foretells_what_its_checkpoint_does(row, pico, tmp_path):
    whole, bare = pico(row, dtype=torch.bfloat16), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    with pytest.raises(HalveError, match="no weights"):
        make_plan(bare, PruneOptions(**SIZES))
    first, second = (
        make_plan(folder, PruneOptions(**SIZES), needs_weights=False)
        for folder in (whole, bare)
    )
    assert first.layout.has_weights
    assert not second.layout.has_weights
    assert first.layout.output_bytes == second.layout.output_bytes
    found = [forecast_run(plan, 2**40) for plan in (first, second)]
    assert found[0].phases == found[1].phases
    assert found[0].operations == found[1].operations


@pytest.mark.parametrize("row", MIXTURES)
def test_a_config_of_experts_is_refused_as_their_checkpoint_is(row, pico, tmp_path):
    shutil.copy(pico(row) / "config.json", tmp_path)
    with pytest.raises(HalveError, match="not supported yet"):
        make_plan(tmp_path, PruneOptions(**SIZES), needs_weights=False)
