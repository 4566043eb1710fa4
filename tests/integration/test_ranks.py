"""Several processes under torchrun do what one does, and end together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halve
from halve.distributed import Ranks
from halve.options import PruneOptions, RunOptions
from halve.pruning import prune_model
from halve.records import PruneRecord
from tests.integration.test_resume import Stopped, digests, stop_at

RANKS = 2
# Three batches of 16 windows, apart from those that are held out.
OPTIONS: dict[str, Any] = {"samples": 50, "seq_len": 64, "device": "cpu"}
JOBS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda", "sparsity": "2:4"},
    "sparsegpt": {"solver": "sparsegpt", "sparsity": "60%"},
    "admm": {"solver": "admm"},
    "auto": {"solver": "auto"},
    "rounded": {"solver": "sparsegpt", "quantize": "int4", "group_size": 32},
    "refined": {"solver": "auto", "refine": True},
    "allocated": {"solver": "sparsegpt", "allocation": "error", "sparsity": "63%"},
}


def launch(
    where: list[object], processes: int, *arguments: object
) -> "subprocess.Popen[str]":
    """Start a module in processes of one thread each."""
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
    """Wait for a launcher, which is killed where it does not end."""
    with launcher:
        try:
            said = launcher.communicate(timeout=300)
        finally:
            launcher.kill()
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, *said)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module with two processes, one thread each."""
    return wait_for(launch(["--standalone"], RANKS, *arguments))


def _folders(pico, text, root):
    """Return for each job what one process made, and what two did."""
    jobs, pairs = [], {}
    model = pico("opt", dtype=torch.bfloat16)
    for name, changes in JOBS.items():
        options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | changes
        pairs[name] = root / f"{name}-alone", root / f"{name}-together"
        halve.prune(model, pairs[name][0], **options)
        jobs.append([str(model), str(pairs[name][1]), options])
    # Begun by one process, to be gone on with by two.
    with pytest.raises(Stopped):
        halve.prune(model, root / "begun", progress=stop_at(13), **jobs[4][2])
    pairs["begun"] = pairs["auto"][0], root / "begun"
    jobs.append([str(model), str(root / "begun"), jobs[4][2]])
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun("tests.integration.ranks_worker", "jobs", root / "jobs.json")
    assert done.returncode == 0, done.stderr
    return pairs


def test_two_ranks_do_what_one_process_does(pico, text, tmp_path):
    """One test of many laws, since starting processes takes longest of all."""
    folders = _folders(pico, text, tmp_path)
    for name, (alone, together) in folders.items():
        _check_records(alone, together)
        if name != "refined":
            assert digests(alone) == digests(together), name
    alone, together = folders["refined"]
    _check_refined(alone, together, text)
    _check_finished(folders["sparsegpt"][1], pico, text)


def _check_records(alone, together):
    """Two processes measure what one does."""
    ours, theirs = (
        PruneRecord.from_json((folder / "halve.json").read_text())
        for folder in (alone, together)
    )
    assert ours.identity == theirs.identity
    # The first block alone: where that is refined, the next is given other inputs.
    mine, other = ours.blocks[0], theirs.blocks[0]
    assert _near(mine.refined, other.refined, rel=0.05)
    for one, two in zip(mine.matrices, other.matrices, strict=True):
        assert one.sparsity == pytest.approx(two.sparsity, abs=1e-3)
        assert _near(one.error, two.error), one.tensor
        assert _near(one.held_out, two.held_out), one.tensor


def _near(one, other, rel=1e-5):
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=rel)


def _check_refined(alone, together, text):
    """Not alike: where one takes a step on two windows, each of two takes one."""
    options: dict[str, Any] = {"data": str(text), "seq_len": 64, "segments": 20}
    first, second = (
        halve.perplexity(f, device="cpu", **options).perplexity
        for f in (alone, together)
    )
    assert second == pytest.approx(first, rel=1e-2)


def _check_finished(together, pico, text):
    """A finished folder is left alone by any number of processes."""
    before = digests(together)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | JOBS["sparsegpt"]
    record = halve.prune(pico("opt", dtype=torch.bfloat16), together, **options)
    assert record.sparsity == pytest.approx(0.6, abs=1e-3)
    assert digests(together) == before


def command(model, out, text, samples=16, seq_len=32):
    """Return arguments of `halve prune`."""
    options = ["--calibration", text, "--samples", samples, "--seq-len", seq_len]
    options += ["--solver", "sparsegpt"]
    return ["prune", model, "-o", out, *options, "--device", "cpu"]


def _prune_alone(model, out, text, **options):
    """Do what `command` says in this process."""
    given: dict[str, Any] = {"samples": 16, "seq_len": 32, "solver": "sparsegpt"}
    given |= {"device": "cpu", "calibration": str(text)} | options
    halve.prune(model, out, **given)


def test_a_rank_that_dies_ends_the_run_and_one_process_goes_on(pico, text, tmp_path):
    out = tmp_path / "out"
    model = pico("llama", num_hidden_layers=3)
    worker = ["tests.integration.ranks_worker", "dies", 1, "propagating"]
    ended = torchrun(*worker, *command(model, out, text))
    assert ended.returncode == 1
    assert "it goes on where it stopped" in ended.stderr
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
    said = [line for line in ended.stderr.splitlines() if line.startswith("Error:")]
    assert set(said) == {"Error: The rank had a bad day. Let it rest."}
    assert len(said) == 2  # the one where it happened, and rank 0 in any case
    assert "halve" not in _tracebacks(ended.stderr)


def test_two_machines_prune_once_and_speak_once(pico, text, tmp_path):
    """A launcher for each machine, of which this one plays both."""
    out = tmp_path / "out"
    sizes: dict[str, Any] = {"samples": 50, "seq_len": 64}  # several batches
    model = pico("llama")
    arguments = [*command(model, out, text, **sizes), "--json"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = ["--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        launch(["--nnodes", 2, "--node-rank", rank, *address], 1, "halve", *arguments)
        for rank in (0, 1)
    ]
    speaking, silent = (wait_for(node) for node in nodes)
    assert silent.returncode == speaking.returncode == 0, speaking.stderr
    assert not silent.stdout
    assert json.loads(speaking.stdout) == json.loads((out / "halve.json").read_text())
    _prune_alone(model, tmp_path / "alone", text, **sizes)
    assert digests(out) == digests(tmp_path / "alone")


def _tracebacks(text: str) -> str:
    """Return lines of tracebacks that name files, torchrun's own ones apart."""
    lines = [line for line in text.splitlines() if line.lstrip().startswith('File "')]
    return "\n".join(line for line in lines if "torch/distributed" not in line)


def test_fewer_windows_than_ranks_are_refused(pico, text, tmp_path):
    settings = PruneOptions(**OPTIONS | {"samples": 4, "calibration": str(text)})
    with pytest.raises(halve.HalveError, match="4 processes were started for"):
        prune_model(
            pico("llama"), tmp_path / "out", settings, RunOptions(), _Silent(size=4)
        )


class _Silent(Ranks):
    """Ranks of which no other is there."""

    def broadcast_object(self, make, source=0):
        return make()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_work_is_dealt_out_evenly(size):
    costs = [5.0, 1.0, 1.0, 3.0, 2.0]
    owners = Ranks(size=size).assign(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(size)
    ]
    assert max(loads) == {1: 12, 2: 6, 3: 5}[size]
    numbers = [n for rank in range(size) for n in Ranks(rank, size).my_indices(7)]
    assert sorted(numbers) == list(range(7))
