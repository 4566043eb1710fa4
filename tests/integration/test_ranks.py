"""Several processes under torchrun give one process's results, and end together."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halve
from halve import distributed
from halve.checkpoint.pickles import load_pickle
from halve.distributed import Ranks, join
from halve.errors import DistributedError, NumericalError, ReportedError
from halve.options import PruneOptions, RunOptions
from halve.patterns import Unstructured
from halve.pruning import prune_model
from halve.records import PruneRecord
from halve.records.stored import read_measurements
from tests.interruptions import Stopped, digests, stop_at

RANKS = 2
# Three batches of 16 samples, and two held-out samples.
OPTIONS: dict[str, Any] = {"samples": 50, "seq_len": 64, "device": "cpu"}
JOBS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda", "sparsity": "2:4"},
    "sparsegpt": {"solver": "sparsegpt", "sparsity": "60%"},
    "admm": {"solver": "admm"},
    "auto": {"solver": "auto"},
    "rounded": {"solver": "sparsegpt", "quantize": "int4", "group_size": 32},
    "refined": {"solver": "auto", "refine": True, "allocation": "uniform"},
    "allocated": {"solver": "sparsegpt", "allocation": "error", "sparsity": "63%"},
    "experts": {"solver": "auto"},
}
# Of a mixture of experts in place of OPT. The rows of an expert are gathered from all
# of a process's batches, so their sums have other last bits.
MIXTURE = "experts"


def launch(
    where: list[object], processes: int, *arguments: object
) -> "subprocess.Popen[str]":
    """Start torchrun with a module, in processes of one thread each."""
    command = ["torch.distributed.run", *where, "--nproc-per-node", processes, "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, [*command, *arguments])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def wait_for(launcher: "subprocess.Popen[str]") -> subprocess.CompletedProcess[str]:
    """Wait for torchrun to end; kill it after five minutes."""
    with launcher:
        try:
            output = launcher.communicate(timeout=300)
        finally:
            launcher.kill()
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, *output)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module with two processes, one thread each."""
    return wait_for(launch(["--standalone"], RANKS, *arguments))


def _folders(pico, text, root):
    """Return, for each job, the output of one process and that of two."""
    jobs, pairs = [], {}
    models = {False: pico("opt", dtype=torch.bfloat16), True: pico("gpt_oss")}
    for name, changes in JOBS.items():
        model = models[name == MIXTURE]
        options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | changes
        pairs[name] = root / f"{name}-alone", root / f"{name}-together"
        halve.prune(model, pairs[name][0], **options)
        jobs.append([str(model), str(pairs[name][1]), options])
    model = models[False]
    # Started by one process, to be resumed by two.
    with pytest.raises(Stopped):
        halve.prune(model, root / "resumed", progress=stop_at(13), **jobs[4][2])
    pairs["resumed"] = pairs["auto"][0], root / "resumed"
    jobs.append([str(model), str(root / "resumed"), jobs[4][2]])
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun("tests.integration.ranks_worker", "jobs", root / "jobs.json")
    assert done.returncode == 0, done.stderr
    return pairs


def test_two_ranks_do_what_one_process_does(pico, text, tmp_path):
    """One test of many laws, since starting processes takes most of the time."""
    folders = _folders(pico, text, tmp_path)
    for name, (alone, together) in folders.items():
        _check_records(alone, together, rel=0.02 if name == MIXTURE else 1e-5)
        if name not in {"refined", MIXTURE}:
            assert digests(alone) == digests(together), name
    alone, together = folders["refined"]
    _check_refined(alone, together, text)
    _check_finished(folders["sparsegpt"][1], pico, text)


def _check_records(alone, together, rel):
    """The errors that two processes record are those of one."""
    expected, actual = (
        PruneRecord.from_json((folder / "halve.json").read_text())
        for folder in (alone, together)
    )
    assert expected.identity == actual.identity
    # Only the first block: where it is refined, the next one has other inputs.
    first, second = expected.blocks[0], actual.blocks[0]
    assert _near(first.refined, second.refined, rel=0.05)
    for one, two in zip(first.matrices, second.matrices, strict=True):
        assert one.sparsity == two.sparsity
        assert _near(one.error, two.error, rel), one.tensor
        assert _near(one.held_out, two.held_out, rel), one.tensor
    assert first.expert_tokens == second.expert_tokens


def _near(one, other, rel=1e-5):
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=rel)


def _check_refined(alone, together, text):
    """Only roughly equal: each process takes Adam's steps on half of the samples."""
    options: dict[str, Any] = {"data": str(text), "seq_len": 64, "segments": 20}
    first, second = (
        halve.perplexity(f, device="cpu", **options).perplexity
        for f in (alone, together)
    )
    assert second == pytest.approx(first, rel=1e-2)


def _check_finished(together, pico, text):
    """No number of processes touches a finished output."""
    before = digests(together)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | JOBS["sparsegpt"]
    record = halve.prune(pico("opt", dtype=torch.bfloat16), together, **options)
    for matrix in record.all_matrices:
        elements = matrix.rows * matrix.columns
        assert round(matrix.sparsity * elements) == Unstructured(0.6).count(elements)
    assert digests(together) == before


def command(model, out, text, samples=16, seq_len=32):
    """Return the arguments of `halve prune`."""
    options = ["--calibration", text, "--samples", samples, "--seq-len", seq_len]
    options += ["--solver", "sparsegpt"]
    return ["prune", model, "-o", out, *options, "--device", "cpu"]


def _prune_alone(model, out, text, **options):
    """Prune with the arguments of `command`, in this process."""
    given: dict[str, Any] = {"samples": 16, "seq_len": 32, "solver": "sparsegpt"}
    given |= {"device": "cpu", "calibration": str(text)} | options
    halve.prune(model, out, **given)


def test_a_rank_that_dies_ends_the_run_and_one_process_resumes_it(pico, text, tmp_path):
    out = tmp_path / "out"
    model = pico("llama", num_hidden_layers=3)
    worker = ["tests.integration.ranks_worker", "dies", 1, "propagating"]
    ended = torchrun(*worker, *command(model, out, text))
    assert ended.returncode == 1
    assert "Start the same command again to resume" in ended.stderr
    assert "halve" not in _tracebacks(ended.stderr)
    assert not out.exists()
    phases = []
    _prune_alone(model, out, text, progress=phases.append)
    assert phases[0].phase == "catching up"
    assert halve.inspect(out).sparsity == 0.5


def test_what_fails_on_one_rank_ends_all_with_its_message(pico, text, tmp_path):
    worker = ["tests.integration.ranks_worker", "fails", 1, "propagating"]
    model = pico("llama", num_hidden_layers=3)
    ended = torchrun(*worker, *command(model, tmp_path / "out", text))
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("Error:")]
    assert set(errors) == {"Error: The matrix is singular. Increase the damping."}
    assert len(errors) == 2  # the rank that failed, and rank 0 in any case
    assert "halve" not in _tracebacks(ended.stderr)


def test_two_machines_prune_once_and_evaluate_and_print_once(pico, text, tmp_path):
    """One torchrun per machine; this machine plays both."""
    out = tmp_path / "out"
    sizes: dict[str, Any] = {"samples": 50, "seq_len": 64}  # several batches
    model = pico("llama")
    arguments = [*command(model, out, text, **sizes), "--json", "--evaluate", text]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = ["--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        launch(["--nnodes", 2, "--node-rank", rank, *address], 1, "halve", *arguments)
        for rank in (0, 1)
    ]
    printing, silent = (wait_for(node) for node in nodes)
    assert silent.returncode == printing.returncode == 0, printing.stderr
    assert not silent.stdout
    printed = json.loads(printing.stdout)
    [kept] = read_measurements(out)
    assert printed.pop("evaluation") == kept.record
    assert printed == json.loads((out / "halve.json").read_text())
    (out / "measurements.json").unlink()
    _prune_alone(model, tmp_path / "alone", text, **sizes)
    assert digests(out) == digests(tmp_path / "alone")


def _tracebacks(text: str) -> str:
    """Return the lines of tracebacks that name files, except those of torchrun."""
    lines = [line for line in text.splitlines() if line.lstrip().startswith('File "')]
    return "\n".join(line for line in lines if "torch/distributed" not in line)


def test_fewer_windows_than_ranks_are_refused(pico, text, tmp_path):
    settings = PruneOptions(**OPTIONS | {"samples": 4, "calibration": str(text)})
    with pytest.raises(halve.HalveError, match=r"4 processes .* for 3 windows"):
        prune_model(
            pico("llama"),
            tmp_path / "out",
            settings,
            RunOptions(),
            _Unconnected(size=4),
        )


class _Unconnected(Ranks):
    """One process of a group whose other processes do not exist."""

    def broadcast_object(self, make, source=0):
        return make()


@pytest.fixture
def store(monkeypatch):
    """Let `join` treat this process as rank 1 of 2; return the group's store."""
    torch_distributed: Any = distributed.dist
    store = torch_distributed.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "_connect", lambda: (Ranks(1, RANKS), store))
    monkeypatch.setattr(distributed, "_REPORT_WAIT_SECONDS", 0.2)
    previous = signal.getsignal(signal.SIGTERM)
    yield store
    signal.signal(signal.SIGTERM, previous)


def _load_until_stopped(patch, path):
    """Read a pickle, and get SIGTERM while torch parses it."""
    torch.save({"a": torch.zeros(2)}, path)
    patch.setattr(torch, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    load_pickle(path, "cpu")


def test_a_rank_stopped_while_it_reads_a_file_does_not_blame_the_file(
    store, monkeypatch, tmp_path
):
    """Parsers turn every Exception into a diagnosis; SIGTERM must not be one."""
    path = tmp_path / "pytorch_model.bin"
    with pytest.raises(DistributedError, match="was stopped by torchrun"), join():
        _load_until_stopped(monkeypatch, path)
    stored = pickle.loads(store.get("halve/first-failure"))
    assert isinstance(stored, DistributedError)


def test_a_rank_that_is_stopped_raises_what_another_has_reported(
    store, monkeypatch, tmp_path
):
    failure = NumericalError("The matrix is singular.", "Increase the damping.")
    store.add("halve/failures", 1)
    store.set("halve/first-failure", pickle.dumps(failure))
    with pytest.raises(ReportedError, match="The matrix is singular"), join():
        _load_until_stopped(monkeypatch, tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_tasks_are_assigned_evenly(size):
    costs = [5.0, 1.0, 1.0, 3.0, 2.0]
    owners = Ranks(size=size).assign(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(size)
    ]
    assert max(loads) == {1: 12, 2: 6, 3: 5}[size]
    numbers = [n for rank in range(size) for n in Ranks(rank, size).my_indices(7)]
    assert sorted(numbers) == list(range(7))
