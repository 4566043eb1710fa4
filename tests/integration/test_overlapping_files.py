"""Files that are read and written while the GPU works: in order, and never in vain."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import halve
from halve.checkpoint import Workspace
from halve.errors import CheckpointError, NumericalError, OutputError
from halve.pruning import run
from halve.pruning.commit_queue import CommitQueue
from halve.runtime.read_ahead import ReadAhead
from tests.integration.gpu_ways import OPTIONS, opened, overlap_files
from tests.interruptions import digests

CPU = torch.device("cpu")


def _options(text: Path) -> dict[str, Any]:
    return OPTIONS | {"calibration": str(text), "solver": "sparsegpt"}


def test_a_set_that_was_read_ahead_is_read_once():
    read, threads = [], []

    def load(names):
        read.append(names)
        threads.append(threading.current_thread().name)
        return {name: torch.zeros(1) for name in names}

    ahead = ReadAhead(load, CPU)
    ahead.start(["b"])
    ahead.start(["b"])
    assert ahead.take(["a"]).keys() == {"a"}  # out of turn: the other one stays
    assert ahead.take(["b"]).keys() == {"b"}
    assert sorted(read) == [["a"], ["b"]]
    assert threads[read.index(["b"])].startswith("halve-read-ahead")
    ahead.start(["c"])
    ahead.start(["d"])
    assert ahead.take(["d"]).keys() == {"d"}
    ahead.close()


def test_blocks_are_read_ahead_in_order(pico):
    model = opened(pico("llama"))
    ahead = ReadAhead(model.checkpoint.read, CPU)
    taken = []
    real = ahead.take

    def take(names):
        taken.append(ahead._ahead is not None and ahead._ahead[0] == names)
        return real(names)

    ahead.take = take
    for index in range(model.depth):
        with replace(model, read_ahead=ahead).block(index) as block:
            values = {n: p.clone() for n, p in block.named_parameters()}
        with model.block(index) as block:
            assert all(torch.equal(p, values[n]) for n, p in block.named_parameters())
    assert taken == [False] + [True] * (model.depth - 1)
    ahead.close()


def test_an_error_of_reading_ahead_is_raised_where_the_block_is_loaded(
    pico, text, tmp_path, monkeypatch
):
    """The first block is committed by then, and the next run goes on behind it."""
    overlap_files(monkeypatch)
    options = _options(text)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        real = ReadAhead._load

        def load(self, names):
            raise CheckpointError("It could not be read.", "Check the disk.")

        patch.setattr(ReadAhead, "_load", load)
        with pytest.raises(CheckpointError, match="could not be read"):
            halve.prune(pico("llama"), out, **options)
        patch.setattr(ReadAhead, "_load", real)
    # Three shards hold what is outside the blocks; then there is the first block.
    assert count_committed(out) == 4
    phases = []
    halve.prune(pico("llama"), out, progress=phases.append, **options)
    assert [p.phase for p in phases if p.block == 0] == ["catching up"]
    halve.prune(pico("llama"), tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


def count_committed(out: Path) -> int:
    ledger = out.parent / f"{out.name}.partial" / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    return sum("file" in line for line in lines)


def fail_commits(patch, count: int) -> None:
    """Let the commit of that number fail, as on a full disk."""
    calls = []
    real = Workspace.commit

    def commit(self, *args):
        calls.append(args)
        if len(calls) == count:
            raise OutputError("It could not be written.", "Free some space.")
        return real(self, *args)

    patch.setattr(Workspace, "commit", commit)


@pytest.mark.parametrize("count", [1, 4, 5])  # the last two are blocks
def test_an_error_of_a_commit_ends_the_run_which_can_be_resumed(
    count, pico, text, tmp_path, monkeypatch
):
    overlap_files(monkeypatch)
    options = _options(text)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_commits(patch, count)
        with pytest.raises(OutputError, match="could not be written"):
            halve.prune(pico("llama"), out, **options)
    assert not out.exists()
    assert count_committed(out) == count - 1
    halve.prune(pico("llama"), out, **options)
    halve.prune(pico("llama"), tmp_path / "whole", **options)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_commit_is_completed_when_the_run_is_stopped():
    done, may_end = [], threading.Event()

    def commit():
        may_end.wait(10)
        done.append(1)

    with pytest.raises(KeyboardInterrupt), CommitQueue(in_thread=True) as commits:
        commits.submit(commit)
        commits.check()  # does not wait
        assert not done
        may_end.set()
        raise KeyboardInterrupt
    assert done == [1]


def fail():
    raise OutputError("The disk is full.", "Free some space.")


@pytest.mark.parametrize("in_thread", [False, True])
def test_commits_fail_in_order(in_thread):
    order = []
    with (
        pytest.raises(OutputError, match="is full"),
        CommitQueue(in_thread) as commits,
    ):
        commits.submit(lambda: order.append(1))
        commits.submit(fail)
        commits.submit(lambda: order.append(2))
    assert order == [1]


def test_the_error_of_the_run_comes_first():
    with pytest.raises(NumericalError), CommitQueue(in_thread=True) as commits:
        commits.submit(fail)
        raise NumericalError("It is NaN.", "Check it.")


def test_nothing_overlaps_on_the_cpu_or_within_a_limit(pico, text, monkeypatch):
    seen = []

    class Seen(Exception):  # noqa: N818  (control flow, not an error)
        pass

    def watch(run):
        seen.append((run.overlaps, run_overlaps(run)))
        raise Seen

    run_overlaps = run.overlaps_files
    monkeypatch.setattr(run, "overlaps_files", watch)
    for memory in (None, 2**40):
        with pytest.raises(Seen):
            halve.prune(
                pico("llama"),
                text.parent / "out-never-written",
                calibration=str(text),
                memory=memory,
                **OPTIONS,
            )
    assert seen == [(True, False), (False, False)]
