"""Whatever stops a run, the next one resumes it and writes the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

import halve
from halve.errors import OutputError
from tests.interruptions import STOPPED, Stopped, digests, stop_at, stop_at_rename
from tests.tables import BUNDLED

OPTIONS = {"samples": 8, "seq_len": 32, "device": "cpu"}


@pytest.fixture
def undisturbed(pico, text, tmp_path):
    out = tmp_path / "undisturbed"
    halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    return digests(out)


# Each differs from another row in one option only, and takes half a minute.
LONG = ("allocated, packed", "refined, dense targets")
# Rows with so many phases that stopping at every second one is enough. At every
# third one, some phases of every block would be left out.
MANY = ("refined", "allocated")


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, marks=pytest.mark.slow) if r in LONG else r for r in STOPPED],
)
def test_stopped_at_every_phase(row, pico, text, tmp_path):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | STOPPED[row]
    phases = []
    halve.prune(pico("llama"), tmp_path / "whole", progress=phases.append, **options)
    assert len(phases) >= 2 * 3  # of two blocks: solving, propagating, writing
    for count in range(1, len(phases) + 1, 2 if row in MANY else 1):
        out = tmp_path / f"out-{count}"
        with pytest.raises(Stopped):
            halve.prune(pico("llama"), out, progress=stop_at(count), **options)
        assert not out.exists()
        halve.prune(pico("llama"), out, **options)
        assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.slow  # test_write_failures.py makes every disk operation fail
def test_stopped_at_every_write(pico, text, tmp_path, monkeypatch, undisturbed):
    """Stop before each rename that completes a file, or the output folder."""
    stops = 0
    for count in range(1, 40):
        out = tmp_path / f"out-{count}"
        with monkeypatch.context() as patch:
            done = stop_at_rename(patch, count)
            try:
                halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
            except Stopped:
                stops += 1
                assert not out.exists()
        if done():
            break
        halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
        assert digests(out) == undisturbed
    assert stops > 8


@pytest.mark.parametrize("cut", [0, 1, 20, 100])
def test_a_truncated_ledger_costs_one_shard_at_most(
    cut, pico, text, tmp_path, undisturbed
):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        halve.prune(
            pico("llama"),
            out,
            calibration=str(text),
            progress=stop_at(6),
            **OPTIONS,
        )
    ledger = out.with_name("out.partial") / "ledger.jsonl"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: len(whole) - cut])
    halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    assert digests(out) == undisturbed


# Of two blocks, each runs dense and has its rows weighed before anything is written.
@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("cut", [1, 20])
def test_a_truncated_ledger_is_resumed_twice(
    cut, stop, pico, text, tmp_path, undisturbed
):
    """The first resume leaves a ledger that the second one can read.

    It must remove all of the incomplete line, but keep the newline before it:
    otherwise the next line that it appends would continue the last complete one.
    """
    out = tmp_path / "out"
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    ledger = out.with_name("out.partial") / "ledger.jsonl"
    with pytest.raises(Stopped):
        halve.prune(pico("llama"), out, progress=stop_at(10), **options)
    before = ledger.read_bytes()
    ledger.write_bytes(before[:-cut])
    with pytest.raises(Stopped):
        halve.prune(pico("llama"), out, progress=stop_at(stop), **options)
    complete = before[: before.rindex(b"\n", 0, -1) + 1]
    assert ledger.read_bytes().startswith(complete)
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
    assert len(lines) > complete.count(b"\n")
    halve.prune(pico("llama"), out, **options)
    assert digests(out) == undisturbed


def test_a_damaged_shard_is_written_again(pico, text, tmp_path, undisturbed):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        halve.prune(
            pico("llama"),
            out,
            calibration=str(text),
            progress=stop_at(6),
            **OPTIONS,
        )
    shard = max(out.with_name("out.partial").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    assert digests(out) == undisturbed


def test_other_arguments_are_refused_and_named(pico, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        halve.prune(
            pico("llama"), out, calibration=str(text), progress=stop_at(6), **OPTIONS
        )
    with pytest.raises(OutputError, match=r"sparsity: 50% there, 2:4 here"):
        halve.prune(
            pico("llama"), out, sparsity="2:4", calibration=str(text), **OPTIONS
        )


def test_a_finished_output_is_not_touched(pico, text, tmp_path):
    out = tmp_path / "out"
    first = halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    assert again == first
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(OutputError, match="seed: 0 there, 1 here"):
        halve.prune(pico("llama"), out, seed=1, calibration=str(text), **OPTIONS)


def test_activations_on_disk_or_in_memory_give_the_same_bytes(
    pico, text, tmp_path, undisturbed
):
    out = tmp_path / "mapped"
    halve.prune(
        pico("llama"), out, calibration=str(text), activation_memory=0, **OPTIONS
    )
    assert digests(out) == undisturbed


def test_the_record_matches_the_files(pico, text, tmp_path):
    out = tmp_path / "out"
    record = halve.prune(pico("llama"), out, calibration=str(text), **OPTIONS)
    assert json.loads((out / "halve.json").read_text()) == json.loads(record.to_json())
    found = digests(out)
    assert {file: found[file] for file in record.shards} == record.shards
    inspected = {m.tensor: m.sparsity for m in halve.inspect(out).matrices}
    recorded = {m.tensor: m.sparsity for b in record.blocks for m in b.matrices}
    assert inspected == recorded


@pytest.mark.slow  # benchmarks/faults.py does this a hundred times
@pytest.mark.parametrize("seconds", [6.0])
def test_killed_by_sigkill(seconds, tmp_path):
    """SIGKILL during `halve prune` of the bundled model."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "halve", "prune", str(BUNDLED), "-o", str(out)]
    command += ["--calibration", "stdlib", "--samples", "16", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    other = tmp_path / "whole"
    command[command.index(str(out))] = str(other)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(out) == digests(other)
