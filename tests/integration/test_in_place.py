"""Outputs that no rename can replace: mounted volumes, `.`, folders of others."""

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import halve
from halve.checkpoint import disk, work_folder
from halve.errors import OutputError
from tests.integration.test_write_failures import after, before, fail_at, watch
from tests.interruptions import Stopped, digests, stop_at

PLAIN: dict[str, Any] = {"solver": "magnitude", "device": "cpu"}


@pytest.fixture
def run(pico) -> Callable:
    return partial(halve.prune, pico("llama"), **PLAIN)


@pytest.fixture
def whole(run, tmp_path) -> dict[str, str]:
    run(tmp_path / "whole")
    return digests(tmp_path / "whole")


@pytest.fixture
def volume(tmp_path, monkeypatch) -> Path:
    """Return an empty folder that behaves as one on which a disk is mounted."""
    folder = tmp_path / "volume"
    folder.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    rename = disk.rename

    def refuse(source, target):
        if target == folder:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(disk, "rename", refuse)
    return folder


def test_a_mounted_volume_is_filled(run, whole, volume):
    (volume / "lost+found").mkdir()  # as in every new file system
    place = volume.stat().st_ino
    record = run(volume)
    assert volume.stat().st_ino == place
    assert digests(volume) == whole
    assert halve.verify(volume).sound
    assert not (volume / ".halve.partial").exists()
    assert run(volume) == record  # finished: nothing to do
    assert not list(volume.parent.glob("*.partial"))


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_every_verb_fills_a_volume(verb, run, volume, tmp_path):
    run(tmp_path / "source", packed=verb == "unpack")
    getattr(halve, verb)(tmp_path / "source", tmp_path / "whole")
    getattr(halve, verb)(tmp_path / "source", volume)
    assert digests(volume) == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", [".", "", "../here", "here/.."])
def test_the_current_folder_is_filled(name, run, whole, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / ("" if name == "here/.." else "here"))
    if name == "here/..":
        with pytest.raises(OutputError, match="already exists, and contains here"):
            run(name)
        return
    run(name)
    assert digests(Path.cwd()) == whole
    assert Path.cwd().samefile(tmp_path / "here")


def test_work_in_the_current_folder_is_resumed_from_another(
    run, whole, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(Stopped):
        run(".", progress=stop_at(4))
    assert [path.name for path in Path.cwd().iterdir()] == [".halve.partial"]
    monkeypatch.chdir(tmp_path)
    run("here")
    assert digests(tmp_path / "here") == whole


def test_a_link_to_an_empty_folder_is_that_folder(run, whole, tmp_path):
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to("large-disk")
    run(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert digests(tmp_path / "large-disk") == whole


def _last_operations(run, out) -> tuple[int, int]:
    """Return how many disk operations a run makes, and at which it publishes."""
    names: list[tuple[str, str]] = []

    def each(operation, name, *arguments):
        names.append((name, Path(arguments[0]).name))
        operation(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, each)
        run(out)
    return len(names), names.index(("remove", "ledger.jsonl")) + 1


@pytest.mark.parametrize("manner", [before, after])
def test_publishing_may_fail_anywhere(manner, run, whole, volume, monkeypatch):
    count, first = _last_operations(run, volume)
    assert count - first > len(whole)
    for number in range(first, count + 1):
        for path in sorted(volume.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        with monkeypatch.context() as patch:
            fail_at(patch, number, manner, errno.EIO)
            with pytest.raises(OutputError, match="All files are complete"):
                run(volume)
        run(volume)
        assert digests(volume) == whole
        assert halve.verify(volume).sound
        assert not (volume / ".halve.partial").exists()


def test_files_of_others_are_not_touched(run, volume):
    (volume / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"already exists, and contains notes\.txt"):
        run(volume)
    (volume / "notes.txt").unlink()

    def write_log(progress):
        (volume / "config.json").write_text("mine")

    with pytest.raises(
        OutputError, match=r"config.json exists.*All files are complete"
    ):
        run(volume, progress=write_log)
    assert (volume / "config.json").read_text() == "mine"
    (volume / "config.json").unlink()
    run(volume)
    assert halve.verify(volume).sound


def test_a_rename_that_fails_hides_no_work(run, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rename = disk.rename

    def refuse(source, target):
        if target == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", refuse)
        with pytest.raises(OutputError) as error:
            run(out)
    assert "All files are complete in" in str(error.value)
    assert "out.partial" in str(error.value)
    assert "to resume" in str(error.value)
    assert digests(tmp_path / "out.partial") == whole
    run(out)
    assert digests(out) == whole


def test_the_room_is_measured_where_the_work_lies(run, volume, tmp_path, monkeypatch):
    measured = []
    usage = work_folder.os.statvfs(tmp_path)

    def disk_usage(place):
        measured.append(Path(place))
        return type("Usage", (), {"free": usage.f_bavail * usage.f_frsize})

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    run(volume)
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty")
    run(tmp_path / "new" / "deep")
    assert measured == [volume, tmp_path, tmp_path]


def test_mount_points_of_the_same_disk_are_found(tmp_path, monkeypatch):
    """`mount --bind`: device and parent tell nothing."""
    line = f"36 35 98:0 /x {tmp_path}/with\\040space rw - ext4 /dev/sda rw\n"
    monkeypatch.setattr(Path, "read_bytes", lambda path: line.encode())
    (tmp_path / "with space").mkdir()
    (tmp_path / "other").mkdir()
    place = work_folder.partial_path(tmp_path / "with space")
    assert place == tmp_path / "with space" / ".halve.partial"
    assert work_folder.partial_path(tmp_path / "other").parent == tmp_path


def test_a_folder_in_one_that_is_not_writable_is_filled(
    run, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "theirs" / "mine"
    folder.mkdir(parents=True)
    access = os.access
    closed = tmp_path / "theirs"
    monkeypatch.setattr(os, "access", lambda p, m: Path(p) != closed and access(p, m))
    run(folder)
    assert digests(folder) == whole
