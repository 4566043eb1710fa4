"""No failed disk operation, and no power failure, costs completed work.

Every operation that changes the disk is a function of `halve.checkpoint.disk`. The
tests make each one fail in turn, in three manners, and simulate a power failure after
each.
"""

import errno
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import halve
from halve.checkpoint import disk
from halve.errors import OutputError
from tests.interruptions import Stopped, digests
from tests.tables import files_of_at_most

OPERATIONS = [
    name
    for name, operation in inspect.getmembers(disk, inspect.isfunction)
    if operation.__module__ == disk.__name__ and not name.startswith("_")
]
# Operations that write data, which a failure may leave incomplete.
DATA = {"write", "append"}


def before(operation, name, *arguments):
    """Fail without any effect."""


def half(operation, name, *arguments):
    """Fail after half of the data is written."""
    if name in DATA:
        operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
    if name == "write_pieces":
        pieces = list(arguments[1])
        operation(arguments[0], pieces[: len(pieces) // 2])
    if name == "save":
        operation(*arguments)
        os.truncate(arguments[0], arguments[0].stat().st_size // 2)


def after(operation, name, *arguments):
    """Take effect, but report a failure, as a network file system may."""
    operation(*arguments)


MANNERS = {before: errno.ENOSPC, half: errno.EDQUOT, after: errno.EIO}
# The manner of the first failure; those that follow take the others in turn.
TURNS = {manner.__name__: index for index, manner in enumerate(MANNERS)}
Attempted = list[tuple[str, Path]]


def watch(patch, each: Callable[..., None]) -> None:
    """Replace every operation by a call of `each(operation, name, *arguments)`."""
    for name in OPERATIONS:
        patch.setattr(disk, name, partial(each, getattr(disk, name), name))


def fail_at(patch, count: int, manner, code: int) -> Attempted:
    """Make the count-th operation fail; return the operations attempted so far."""
    attempted: Attempted = []

    def each(operation, name, *arguments):
        attempted.append((name, arguments[0]))
        if len(attempted) == count:
            manner(operation, name, *arguments)
            raise OSError(code, os.strerror(code))
        operation(*arguments)

    watch(patch, each)
    return attempted


PLAIN: dict[str, Any] = {"solver": "magnitude", "device": "cpu"}
UNMERGED_ROW = "prune, to a file for each block"
DECIDED_ROW = "prune, with a decision, packed"
DECIDED: dict[str, Any] = {
    "solver": "sparsegpt",
    "allocation": "error",
    "packed": True,
    "samples": 4,
    "seq_len": 16,
    "device": "cpu",
}


def _prune_unmerged(model: Path, out: Path) -> halve.PruneRecord:
    with files_of_at_most(0):
        return halve.prune(model, out, **PLAIN)


@pytest.fixture
def verb(pico, text, tmp_path):
    """Return a function that returns a row's command, to call with an output folder."""

    def call(row: str):
        if row == "prune":
            return partial(halve.prune, pico("llama"), **PLAIN)
        if row == UNMERGED_ROW:
            return partial(_prune_unmerged, pico("llama"))
        if row == DECIDED_ROW:
            return partial(halve.prune, pico("gpt2"), calibration=str(text), **DECIDED)
        source = tmp_path / "source"
        halve.prune(pico("llama"), source, packed=row == "unpack", **PLAIN)
        return partial(getattr(halve, row), source)

    return call


ROWS = ("prune", UNMERGED_ROW, "pack", "unpack", DECIDED_ROW)
# Where the turns of `make test` begin. The slow tests begin elsewhere: together each
# operation of each verb fails in every manner.
FIRST = {"prune": "before", UNMERGED_ROW: "half", "pack": "after", "unpack": "before"}


@pytest.mark.parametrize(
    ("row", "first"),
    [
        pytest.param(
            row, first, marks=() if FIRST.get(row) == first else pytest.mark.slow
        )
        for row in ROWS
        for first in TURNS
    ],
)
def test_every_disk_operation_may_fail(row, first, verb, tmp_path, monkeypatch):
    run, manners = verb(row), list(MANNERS)
    run(tmp_path / "whole")
    failures = 0
    while True:
        out = tmp_path / f"out-{failures}"
        if failures % 2:
            out.mkdir()  # an empty folder is accepted like an absent one
        manner = manners[(TURNS[first] + failures) % len(manners)]
        with monkeypatch.context() as patch:
            attempted = fail_at(patch, failures + 1, manner, MANNERS[manner])
            try:
                run(out)
            except OutputError as error:
                _check_message(str(error), attempted[-1], out)
            if len(attempted) <= failures:
                break
            failures += 1
        _check_absent_or_complete(out, tmp_path / "whole")
        run(out)
        assert digests(out) == digests(tmp_path / "whole")
        assert halve.verify(out).sound
        assert not out.with_name(out.name + ".partial").exists()
    assert failures > 40


def _check_message(message: str, operation: tuple[str, Path], out: Path) -> None:
    name, path = operation
    assert "could not be written" in message
    assert str(out) in message
    if name in {"write", "write_pieces", "save", "append"}:
        assert path.name.removeprefix(".").removesuffix(".tmp") in message
    assert "run the same command again" in message


def _check_absent_or_complete(out: Path, whole: Path) -> None:
    if out.exists() and any(out.iterdir()):
        assert digests(out) == digests(whole)
        assert halve.verify(out).sound


@dataclass
class Disk:
    """What a power failure leaves of a folder: what was synced, and nothing else.

    Attributes:
        data: Inode of a file -> its contents when it was last synced.
        names: Inode of a folder -> its entries (name -> inode) when it was last synced.
    """

    data: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)

    def follow(self, name: str, path: Path) -> None:
        """Update the state after an operation."""
        inode = path.stat().st_ino if path.exists() else 0
        if name in {"write", "write_pieces", "save"}:
            self.data.pop(inode, None)
        elif name == "make_folder":
            self.names.setdefault(inode, {})
        elif name == "sync" and path.is_file():
            self.data[inode] = path.read_bytes()
        elif name == "sync":
            self.names[inode] = {p.name: p.stat().st_ino for p in path.iterdir()}

    def rebuild(self, inode: int, path: Path) -> None:
        """Write what is left of a folder to `path`."""
        path.mkdir()
        for name, inner in self.names.get(inode, {}).items():
            if inner in self.names:
                self.rebuild(inner, path / name)
            else:
                (path / name).write_bytes(self.data.get(inner, b""))


@pytest.mark.parametrize("row", ["prune", pytest.param("pack", marks=pytest.mark.slow)])
def test_the_power_may_fail_after_every_disk_operation(
    row, verb, tmp_path, monkeypatch
):
    run = verb(row)
    run(tmp_path / "whole")
    count = 0
    while True:
        count += 1
        disk_before, left = tmp_path / f"disk-{count}", tmp_path / f"left-{count}"
        disk_before.mkdir()
        with monkeypatch.context() as patch:
            if not _lose_power(patch, run, disk_before, left, count):
                break
        out = left / "deep" / "out"
        _check_absent_or_complete(out, tmp_path / "whole")
        run(out)
        assert digests(out) == digests(tmp_path / "whole")
    assert count > 40


def _lose_power(patch, run, folder: Path, left: Path, count: int) -> bool:
    """Stop after `count` operations, and rebuild in `left` what was synced by then.

    Renaming a file before it is synced is a defect by itself: the new name might reach
    the disk before the contents.

    Returns:
        False if the run ended before.
    """
    known, attempted = Disk(), []

    def each(operation, name, *arguments):
        if name == "rename" and arguments[0].is_file():
            assert arguments[0].stat().st_ino in known.data, arguments[0]
        operation(*arguments)
        attempted.append(name)
        known.follow(name, arguments[0])
        if len(attempted) == count:
            raise Stopped

    watch(patch, each)
    try:
        run(folder / "deep" / "out")
    except Stopped:
        known.rebuild(folder.stat().st_ino, left)
        return True
    return False


WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
COPYING = {"shutil.copyfile", "shutil.rmtree", "shutil.move", "os.link", "os.symlink"}
_watched: list[tuple[Path, list[str]]] = []


@cache
def _install_audit() -> None:
    """Install the hook once: it cannot be removed. It is inactive outside its test."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    """Record a change to a watched folder that `halve.checkpoint.disk` did not make."""
    if not _watched or not _changes(event, arguments):
        return
    folder, found = _watched[-1]
    if str(folder) in str(arguments[0]) and not _called_by_disk():
        found.append(f"{event} {arguments[0]}")


def _changes(event: str, arguments: tuple) -> bool:
    if event == "open":
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return isinstance(arguments[2], int) and bool(arguments[2] & writes)
    return event in WRITING | COPYING


def _called_by_disk() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == disk.__file__:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("row", ROWS)
def test_no_other_code_changes_the_disk(row, verb, tmp_path):
    """So the tests above cover every write."""
    run, found = verb(row), []
    _install_audit()
    _watched.append((tmp_path / "out", found))
    try:
        run(tmp_path / "out")
        assert found == []
        (tmp_path / "out" / "mark").write_text("")
        assert len(found) == 1  # the hook sees other writes
    finally:
        _watched.pop()
