"""What other systems lack is not needed: modules of POSIX, parts of `os`, `/proc`.

This runs on Linux, where these are taken away. It does not show that macOS or Windows
have whatever else is used.
"""

import os
import subprocess
import sys

import pytest
import torch

import halve
from halve import system
from halve.calibration import spill
from halve.checkpoint import disk, lock, work_folder
from halve.checkpoint.lock import lock_folder
from halve.errors import OutputError

# Prunes, packs and generates where the modules cannot be imported.
WITHOUT = """
import os, sys
import psutil  # of which each system has a part of its own; that of Linux uses resource

MISSING = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in MISSING:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in ("sysconf", "posix_fallocate", "posix_fadvise"):
    delattr(os, name)

import halve

model, text, out = sys.argv[1:]
options = dict(samples=4, seq_len=32, solver="sparsegpt", activation_memory=0)
halve.prune(model, out, calibration=text, **options)
halve.pack(out, f"{out}-packed")
assert halve.verify(f"{out}-packed").sound
halve.generate(f"{out}-packed", "def ", max_new_tokens=2)
assert not set(MISSING) & set(sys.modules)
"""

HOLD = """
import sys, time
from pathlib import Path
from halve.checkpoint import lock

lock.fcntl = None
with lock.lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_main_job_needs_no_module_of_posix(pico, text, tmp_path):
    model, usual, other = pico("llama"), tmp_path / "usual", tmp_path / "other"
    options = {"samples": 4, "seq_len": 32, "solver": "sparsegpt"}
    expected = halve.prune(model, usual, calibration=str(text), **options)
    subprocess.run(
        [sys.executable, "-c", WITHOUT, model, text, other],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = halve.PruneRecord.from_json((other / "halve.json").read_text())
    assert found.shards == expected.shards
    assert found.bytes_peak > 2**26  # of a process that had done nothing before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_mapped_where_there_is_no_proc(dtype, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(spill.Path, "exists", lambda path: False)
    mapped = spill._mapped((3, 4, 5), dtype, tmp_path)
    mapped.copy_(torch.arange(60).view(3, 4, 5))
    assert mapped.sum() == 59 * 30
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="hidden states need"):
        spill.allocate_hidden((2**20, 2**20, 2**10), 0, tmp_path)


class TestLocksWithoutFlock:
    """As on Windows."""

    @pytest.fixture(autouse=True)
    def _no_flock(self, monkeypatch):
        monkeypatch.setattr(lock, "fcntl", None)

    def test_one_run_at_a_time_has_the_lock(self, tmp_path):
        folder = tmp_path / "out.partial"
        folder.mkdir()
        with (
            lock_folder(folder),
            pytest.raises(OutputError, match="Another run"),
            lock_folder(folder),
        ):
            pass
        with lock_folder(folder):
            pass

    def test_a_folder_that_was_renamed_meanwhile_is_not_locked(self, tmp_path):
        with pytest.raises(OutputError, match="Another run"):
            lock_folder(tmp_path / "gone.partial").__enter__()

    def test_the_lock_of_a_killed_run_is_released(self, tmp_path):
        command = [sys.executable, "-c", HOLD, tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "locked\n"
                with pytest.raises(OutputError, match="Another run"):
                    lock_folder(tmp_path).__enter__()
            finally:
                process.kill()
        with lock_folder(tmp_path):
            pass

    def test_its_file_is_not_foreign_in_a_folder_that_is_filled(self, tmp_path):
        inner = tmp_path / ".halve.partial"
        inner.mkdir()
        with lock_folder(inner):
            assert len(list(tmp_path.iterdir())) == 2
            assert not work_folder.foreign_names(tmp_path)


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        disk.sync(path)
        assert synced[-1].st_ino == path.stat().st_ino


class TestDiskOfWindows:
    """Its branches, on Linux."""

    @pytest.fixture(autouse=True)
    def _windows(self, monkeypatch):
        monkeypatch.setattr(disk, "IS_WINDOWS", True)

    def test_folders_are_not_synced_and_files_are(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
        disk.sync(tmp_path)
        disk.write(tmp_path / "file", b"x")
        disk.sync(tmp_path / "file")
        assert [found.st_ino for found in synced] == [(tmp_path / "file").stat().st_ino]

    def test_an_empty_folder_is_replaced(self, tmp_path):
        (tmp_path / "work").mkdir()
        (tmp_path / "work/file").touch()
        (tmp_path / "out").mkdir()
        disk.rename(tmp_path / "work", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_folder_that_holds_something_is_not(self, tmp_path):
        (tmp_path / "work").mkdir()
        (tmp_path / "out/other").mkdir(parents=True)
        with pytest.raises(OSError, match="not empty"):
            disk.rename(tmp_path / "work", tmp_path / "out")


def test_memory_is_told_by_each_source(monkeypatch):
    assert 0 < system.resident_memory() <= system.total_memory()
    assert 0 < system.available_memory() <= system.total_memory()
    of_proc = system.peak_memory()
    monkeypatch.setattr(system, "_peak_of_linux", lambda: 0)
    assert abs(system.peak_memory() / of_proc - 1) < 0.5  # getrusage
    monkeypatch.setattr(system, "_peak_of_posix", lambda: 0)
    assert system.peak_memory() > of_proc / 20
