"""Packing, unpacking and packed pruning resume after any stop, to the same bytes."""

import pytest

import halve
from tests.integration.packed_models import prune
from tests.interruptions import Stopped, digests, stop_at, stop_at_rename

# Verb -> what runs it, given the dense, pruned and packed folders and an output.
VERBS = {
    "pack": lambda folders, out, **more: halve.pack(folders[1], out, **more),
    "unpack": lambda folders, out, **more: halve.unpack(folders[2], out, **more),
    "prune packed": lambda folders, out, **more: prune(
        folders[0], out, packed=True, **more
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_stopped_at_every_step(verb, made, tmp_path):
    folders, run = made(), VERBS[verb]
    expected = digests(folders[1] if verb == "unpack" else folders[2])
    stops = 0
    for count in range(1, 40):
        out = tmp_path / f"out-{count}"
        try:
            run(folders, out, progress=stop_at(count))
        except Stopped:
            stops += 1
            assert not out.exists()
            run(folders, out)
        assert digests(out) == expected
        if stops < count:
            break
    assert 4 < stops < 39


@pytest.mark.parametrize("verb", VERBS)
def test_stopped_at_every_write(verb, made, tmp_path, monkeypatch):
    folders, run = made(), VERBS[verb]
    expected = digests(folders[1] if verb == "unpack" else folders[2])
    stops = 0
    for count in range(1, 40):
        out = tmp_path / f"out-{count}"
        with monkeypatch.context() as patch:
            done = stop_at_rename(patch, count)
            try:
                run(folders, out)
            except Stopped:
                stops += 1
                assert not out.exists()
        if done():
            break
        run(folders, out)
        assert digests(out) == expected
    assert stops > 8


def test_stopped_with_a_solver_that_carries_hidden_states(pico, text, tmp_path):
    """Resuming reads the packed shards of the blocks that were finished."""
    options = {"calibration": str(text), "samples": 8, "seq_len": 32, "device": "cpu"}
    halve.prune(pico("gpt2"), tmp_path / "whole", packed=True, **options)
    with pytest.raises(Stopped):
        halve.prune(
            *(pico("gpt2"), tmp_path / "out"),
            packed=True,
            progress=stop_at(6),
            **options,
        )
    ledger = tmp_path / "out.partial" / "ledger.jsonl"
    assert len(ledger.read_text().splitlines()) > 1
    halve.prune(pico("gpt2"), tmp_path / "out", packed=True, **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    halve.prune(pico("gpt2"), tmp_path / "plain", **options)
    halve.pack(tmp_path / "plain", tmp_path / "packed")
    assert digests(tmp_path / "packed") == digests(tmp_path / "whole")


def test_packed_and_dense_runs_do_not_mix(made, tmp_path):
    dense, _, _ = made()
    with pytest.raises(Stopped):
        prune(dense, tmp_path / "out", packed=True, progress=stop_at(3))
    with pytest.raises(halve.HalveError, match="packed: True there, False here"):
        prune(dense, tmp_path / "out")


def test_a_finished_folder_is_not_rewritten(made, tmp_path):
    _, pruned, _ = made()
    first = halve.pack(pruned, tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert halve.pack(pruned, tmp_path / "out") == first
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert after == before
    with pytest.raises(halve.HalveError, match="verb: pack there"):
        prune(pruned, tmp_path / "out")
