"""The forecast that `--dry-run` prints, and the limit that `--memory` sets."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import halve
from halve.errors import HalveError
from halve.options import PruneOptions
from halve.pruning import MemoryPlan, forecast_run, plan_memory
from halve.pruning import observe_block as observe_module
from halve.pruning import prune as prune_module
from halve.pruning import solve_stage as solve_module
from halve.pruning.memory import forecast as forecast_module
from halve.pruning.plan import make_plan
from tests.tables import FAMILIES, SOLVERS, save_pico

SIZES: dict[str, Any] = {"samples": 64, "seq_len": 128}


@pytest.mark.parametrize("row", FAMILIES)
def test_every_family_has_a_forecast(row, pico):
    forecast = forecast_run(make_plan(pico(row), PruneOptions(**SIZES)))
    largest = forecast.bytes_while(forecast.largest)
    assert forecast.peak == forecast.process + largest
    assert forecast.largest.bytes > 0
    assert forecast.operations > 0


@pytest.mark.parametrize("solver", [*SOLVERS, "auto"])
def test_more_text_and_tuning_take_more(solver, pico):
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


def test_a_limit_decides_whether_hidden_states_stay_in_memory(pico):
    plan = make_plan(pico("llama"), PruneOptions(**SIZES))
    least = forecast_run(plan, 0)
    assert least.resident == 0
    assert least.mapped > 0
    assert least.disk == least.written + least.mapped
    loose = plan_memory(plan, least.peak + 2**30, None)
    assert forecast_run(plan, loose.activations).mapped == 0
    tight = plan_memory(plan, least.peak + 2**26, None)
    assert forecast_run(plan, min(tight.activations, 2**10)).mapped == least.mapped
    assert plan_memory(plan, least.peak + 2**30, 5) == MemoryPlan(5)


def test_an_impossible_limit_is_refused_with_the_largest_use(pico, text, tmp_path):
    with pytest.raises(HalveError, match=r"needs at least .* of memory"):
        halve.prune(
            pico("opt"),
            tmp_path / "out",
            calibration=str(text),
            samples=4,
            seq_len=32,
            memory=2**20,
        )
    assert not (tmp_path / "out").exists()


def test_where_sampling_takes_most_the_limit_says_how_to_do_without(pico):
    sizes = {"samples": 2, "seq_len": 8, "solver": "wanda"}
    deep = pico("llama", num_hidden_layers=24)
    plan = make_plan(deep, PruneOptions(**SIZES | sizes, calibration="self"))
    assert forecast_module.forecast_host(plan, 0).largest.name == "sampling windows"
    with pytest.raises(HalveError, match=r"sampling windows.*--self-samples 0"):
        plan_memory(plan, 2**10, None)


def test_a_limit_moves_hidden_states_and_changes_no_byte(
    pico, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(forecast_module, "resident_memory", lambda: 0)
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


def test_a_tight_limit_defers_the_widest_inputs(pico, monkeypatch):
    monkeypatch.setattr(forecast_module, "resident_memory", lambda: 0)
    plan = make_plan(
        pico("opt", **WIDE["opt"]), PruneOptions(**SIZES, solver="sparsegpt")
    )
    together, deferred = (forecast_run(plan, 0, defer) for defer in (False, True))
    assert deferred.mapped == together.mapped + 4 * plan.tokens * 1024
    assert deferred.peak < together.peak
    assert plan_memory(plan, deferred.peak, None) == MemoryPlan(0, deferred=True)
    assert plan_memory(plan, together.peak, None) == MemoryPlan(0, deferred=True)
    assert plan_memory(plan, together.peak * 10 // 9 + 9, None).deferred is False
    with pytest.raises(HalveError, match=r"needs at least .* of memory"):
        plan_memory(plan, deferred.peak - 1, None)


def test_a_tenth_of_a_limit_is_left_free_where_possible(pico, monkeypatch):
    monkeypatch.setattr(forecast_module, "resident_memory", lambda: 0)
    plan = make_plan(pico("opt"), PruneOptions(**SIZES, solver="sparsegpt"))
    least = forecast_run(plan, 0).peak
    left = plan_memory(plan, 2 * least, None).activations
    assert left == pytest.approx(0.8 * least, rel=0.01)
    assert plan_memory(plan, least + 2**20, None).activations == 0


DEFERRED: tuple[dict[str, Any], ...] = (
    {"solver": "sparsegpt"},
    {"solver": "auto", "sequential": False},
    {"solver": "sparsegpt", "refine": True, "epochs": 1},
    {"solver": "sparsegpt", "allocation": "error"},
)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        pytest.param(
            row, options, marks=pytest.mark.slow if (i + j) % 2 else (), id=f"{row}-{i}"
        )
        for i, options in enumerate(DEFERRED)
        for j, row in enumerate(WIDE)
    ],
)
def test_deferred_inputs_change_no_byte(
    row, options, pico, text, tmp_path, monkeypatch
):
    model, summed = pico(row, **WIDE[row]), []
    sizes: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text)}
    accumulate_deferred = observe_module.accumulate_deferred

    def watched(state, group, *rest):
        summed.append(group.leader)
        return accumulate_deferred(state, group, *rest)

    monkeypatch.setattr(observe_module, "accumulate_deferred", watched)
    halve.prune(model, tmp_path / "together", **sizes, **options)
    assert not summed
    monkeypatch.setattr(
        prune_module, "plan_memory", lambda *_: MemoryPlan(2**30, deferred=True)
    )
    halve.prune(model, tmp_path / "deferred", **sizes, **options)
    assert set(summed) == {"fc2" if row == "opt" else "mlp.down_proj"}
    for file in sorted((tmp_path / "together").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "deferred" / file.name).read_bytes()


# admm corrects targets, which needs the dense matrices of a group until its end.
@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {"admm"}))
def test_a_dense_matrix_is_freed_before_its_solution_is_checked(
    solver, pico, text, tmp_path, monkeypatch
):
    dense: list[StorageWeakRef] = []
    freed: list[bool] = []
    select, is_finite = solve_module._select, solve_module.is_finite

    def selected(candidates, stored, *rest):
        dense.append(StorageWeakRef(stored.untyped_storage()))
        return select(candidates, stored, *rest)

    def checked(rounded):
        freed.append(dense[-1].expired())
        return is_finite(rounded)

    monkeypatch.setattr(solve_module, "_select", selected)
    monkeypatch.setattr(solve_module, "is_finite", checked)
    sizes: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text)}
    model = pico("opt", dtype=torch.bfloat16)
    halve.prune(model, tmp_path / "out", solver=solver, **sizes)
    assert len(freed) == len(dense) > 0
    assert all(freed)


def test_attention_scores_count_where_they_are_materialized(pico):
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

torch.ones(2**22)  # freed, it raises the size up to which glibc retains memory
many = [torch.ones(2**20) for _ in range(32)]
last = torch.ones(2**20)
del many
before = resident()
malloc_trim()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc only")
def test_freed_memory_is_returned_to_the_system():
    command = [sys.executable, "-c", _HOLES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20


@pytest.mark.parametrize("row", FAMILIES)
def test_a_config_alone_gives_the_forecast_of_its_checkpoint(row, pico, tmp_path):
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
    forecasts = [forecast_run(plan, 2**40) for plan in (first, second)]
    assert forecasts[0].phases == forecasts[1].phases
    assert forecasts[0].operations == forecasts[1].operations


_MEASURED = """
import json
import sys
from pathlib import Path
import halve
from halve.options import PruneOptions
from halve.pruning.plan import make_plan
from halve.pruning import forecast_run

model, out, options = json.loads(sys.argv[1])
forecast = forecast_run(make_plan(Path(model), PruneOptions(**options)))
halve.prune(model, out, **options)
status = Path("/proc/self/status").read_text().splitlines()
(peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
print(json.dumps([forecast.process, forecast.peak, int(peak) * 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        pytest.param(
            "opt",
            {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096},
            {"solver": "sparsegpt"},
            marks=pytest.mark.slow,  # `benchmarks/memory.py` has it with larger models
        ),
        (
            "llama",
            {"hidden_size": 1024, "intermediate_size": 3584},
            {"solver": "sparsegpt", "sequential": True},
        ),
    ],
    ids=["one pass", "corrected targets"],
)
def test_the_forecast_is_near_the_measured_peak(
    family, changes, options, text, tmp_path
):
    """Peak of a separate process; benchmarks/memory.py measures larger models."""
    changes |= {"num_hidden_layers": 1, "num_attention_heads": 16}
    model = save_pico(tmp_path / "model", family, dtype=torch.bfloat16, **changes)
    options |= {"samples": 8, "seq_len": 128, "device": "cpu", "calibration": str(text)}
    asked = json.dumps([str(model), str(tmp_path / "out"), options])
    # With as many threads as users have: they have buffers of their own.
    variables = {n: v for n, v in os.environ.items() if n != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, asked],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    process, forecast, peak = json.loads(done.stdout.splitlines()[-1])
    said = f"forecast {forecast / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB"
    print(said)  # noqa: T201  (pytest shows it with -s, and where the test fails)
    assert peak > 1.25 * process  # the model matters
    assert forecast == pytest.approx(peak, rel=0.15), said
