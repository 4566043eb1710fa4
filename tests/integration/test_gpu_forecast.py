"""The forecast of a GPU's memory, on a machine that pretends to have one."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from halve.cli.dry_run import print_dry_run
from halve.errors import HalveError, HalveWarning
from halve.options import PruneOptions, RunOptions
from halve.pruning import dry_run as plan_run
from halve.pruning import forecast_run, plan_memory
from halve.pruning.memory import duration
from halve.pruning.memory import forecast as forecast_module
from halve.pruning.memory import gpu as gpu_module
from halve.pruning.memory.gpu import GpuForecast, forecast_gpu, forecast_memory
from halve.pruning.memory.phases import all_phases
from halve.pruning.memory.workload import Workload
from halve.pruning.plan import make_plan
from halve.pruning.select.candidates import candidates

OPTIONS = PruneOptions(samples=64, seq_len=128)
GPU = torch.device("cuda")
TOTAL = 80 * 2**30


@pytest.fixture
def gpu(monkeypatch) -> dict[str, int]:
    """Pretend that runs are on a GPU; return its bytes, which a test may change."""
    memory = {"free": TOTAL - 2**30, "total": TOTAL}
    for module in (gpu_module, forecast_module):
        monkeypatch.setattr(module, "choose_device", lambda name: GPU)
    info = lambda device: (memory["free"], memory["total"])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    return memory


def forecast(plan) -> GpuForecast:
    found = forecast_gpu(plan)
    assert found is not None
    return found


def test_on_the_cpu_there_is_none(pico):
    plan = make_plan(pico("llama"), replace(OPTIONS, device="cpu"))
    assert forecast_gpu(plan) is None
    assert "gpu" not in plan_run(pico("llama"), OPTIONS, RunOptions()).to_dict()


@pytest.mark.parametrize("options", [{}, {"solver": "magnitude"}, {"refine": True}])
def test_its_phases_are_those_of_the_cpu_without_files(options, pico, gpu):
    plan = make_plan(pico("llama"), replace(OPTIONS, **options))
    found = forecast(plan)
    assert (found.name, found.total, found.taken) == ("H100", TOTAL, 2**30)
    for mine, other in zip(found.phases, forecast_run(plan).phases, strict=True):
        assert mine.name == other.name
        assert mine.parts.keys() == other.parts.keys() - {"files"}
        # Batches and tiles are larger; the rest is the same.
        larger = {"activations", "grams", "batch"}
        for part, count in mine.parts.items():
            assert count >= other.parts[part]
            assert count == other.parts[part] or part in larger
    streams = 0 if options.get("solver") == "magnitude" else 1 + plan.options.has_dense
    assert found.hidden == streams * 4 * plan.tokens * plan.width
    assert found.peak == found.taken + found.hidden + found.largest.bytes


def test_hidden_states_stay_there_while_they_fit(pico, gpu):
    plan = make_plan(pico("llama"), OPTIONS)
    roomy = forecast(plan)
    need = roomy.taken + roomy.largest.bytes
    for total, keeps in ((need + roomy.hidden) * 10 // 9 + 9, True), (need + 9, False):
        tight = forecast_memory(plan, replace(roomy, total=total))
        assert tight.keeps_hidden is keeps
        assert tight.peak == need + keeps * roomy.hidden
        assert tight.fits
    assert not forecast_memory(plan, replace(roomy, total=need - 1)).fits


def test_larger_batches_and_tiles_take_more(pico):
    plan = make_plan(pico("opt", ffn_dim=4096), OPTIONS)
    solvers = [c.solver for c in candidates(plan.options, plan.layout.dtype)]
    usual = Workload(plan, solvers, deferred=False)
    assert usual.batch_tokens == 1024
    assert replace(usual, batch_limit=16384).batch_tokens == 64 * 128
    assert replace(usual, batch_limit=1).batch_tokens == 128
    assert usual.adding_nbytes(4096) == 3 * 4 * 4096 * 512
    wide = replace(usual, tile=4096)
    assert wide.adding_nbytes(4096) == 3 * 4 * 4096 * 4096
    assert wide.adding_nbytes(100) == usual.adding_nbytes(100) == 3 * 4 * 100 * 100
    grams = [
        max(p.parts["grams"] for p in all_phases(work) if p.name == "collecting")
        for work in (usual, wide)
    ]
    assert grams[0] < grams[1]


def test_a_gpu_that_is_too_small_is_warned_of(pico, gpu):
    plan = make_plan(pico("llama"), OPTIONS)
    plan_memory(plan, None, None)  # says nothing
    gpu.update(free=0, total=2**29)
    with pytest.warns(HalveWarning, match=r"may need .* GiB of the memory of H100"):
        plan_memory(plan, None, None)


def test_the_limit_is_that_of_the_host(pico, gpu, monkeypatch):
    monkeypatch.setattr(forecast_module, "resident_memory", lambda: 0)
    plan = make_plan(pico("llama"), OPTIONS)
    libraries = forecast_module._LIBRARIES + forecast_module._CUDA_LIBRARIES
    stored = max(
        sum(plan.layout.tensors[n].nbytes for n in plan.layout.shards[b.shard])
        for b in plan.layout.blocks
    )
    host = forecast_module.forecast_host(plan, 0)
    assert host.process == libraries
    names = {phase.name for phase in host.phases}
    assert names == {"reading text", "embedding", "reading", "writing"}
    assert max(p.bytes for p in host.phases if p.name != "embedding") == 3 * stored
    with pytest.raises(HalveError, match="needs at least"):
        plan_memory(plan, libraries, None)
    assert plan_memory(plan, host.peak, None).activations == 0


def test_a_dry_run_has_a_line_for_it(pico, gpu, monkeypatch, capsys):
    module = sys.modules["halve.pruning.dry_run"]
    monkeypatch.setattr(module, "estimate_seconds", lambda *_: 1.0)
    monkeypatch.setattr(module, "choose_device", lambda name: GPU)
    found = plan_run(pico("llama"), OPTIONS, RunOptions())
    said: dict[str, Any] = found.to_dict()
    assert (said["gpu"], said["gpu_bytes_total"]) == ("H100", TOTAL)
    assert said["gpu_bytes_peak"] == forecast(found.plan).peak
    json.dumps(said)
    print_dry_run(found, verbose=False)
    [line] = [x for x in capsys.readouterr().out.splitlines() if "H100" in x]
    assert "80 GiB" in line
    assert "on the GPU" in line


def test_the_speed_of_a_gpu_is_timed_by_its_clock(monkeypatch):
    calls = []
    monkeypatch.setattr(
        duration, "gpu_seconds", lambda work, device: calls.append(device) or 0.5
    )
    monkeypatch.setattr(duration, "linear", lambda a, b: a)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(0))
    assert duration._operations_per_second(GPU) == 2 * 8192**3 / 0.5
    assert calls == [GPU] * 5
