"""SIGINT and SIGTERM: the exit code, the words, and the same bytes afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import halve
from halve.checkpoint import Workspace
from halve.cli import main
from tests.integration.test_resume import digests
from tests.tables import BUNDLED

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
VERBS = ("prune", "pack", "unpack")


@pytest.fixture(autouse=True)
def usual_handlers():
    """Let signals do what they do in a shell's foreground, wherever tests run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(pico, tmp_path):
    """Return a function that gives a verb's command line, its output folder apart."""

    def words(verb: str) -> list[str]:
        prune = ["prune", str(pico("llama")), "--solver", "magnitude"]
        if verb == "prune":
            return prune
        source = tmp_path / "source"
        packed = ["--pack"] if verb == "unpack" else []
        _run([*prune, "-o", str(source), *packed])
        return [verb, str(source)]

    return words


def _run(words) -> int:
    """Run a command line in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["halve", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("it did not exit")


def signal_at(patch, count, number):
    """Send this process a signal in the middle of its count-th shard."""
    calls = []
    real = Workspace.commit

    def commit(workspace, file, tensors, describe):
        calls.append(file)

        def signalled(path):
            if len(calls) == count:
                os.kill(os.getpid(), number)
            return describe(path)

        return real(workspace, file, tensors, signalled)

    patch.setattr(Workspace, "commit", commit)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_ends_a_run_that_can_go_on(
    verb, number, command, tmp_path, monkeypatch, capsys
):
    words = command(verb)
    assert _run([*words, "-o", str(tmp_path / "whole")]) == 0
    handlers = [signal.getsignal(n) for n in SIGNALS]
    for count in (1, 2, 3):
        out = tmp_path / f"out {count}"
        with monkeypatch.context() as patch:
            signal_at(patch, count, number)
            capsys.readouterr()
            assert _run([*words, "-o", str(out)]) == SIGNALS[number]
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"Interrupted by {signal.Signals(number).name}. ")
        assert said.endswith(f"halve {' '.join(words)} -o '{out}'")
        assert [signal.getsignal(n) for n in SIGNALS] == handlers
        assert not out.exists()
        partial = out.with_name(out.name + ".partial")
        ledger = (partial / "ledger.jsonl").read_text().count('"sha256"')
        assert ledger == count - 1
        assert not [*partial.glob(".*")]
        assert _run([*words, "-o", str(out)]) == 0
        assert digests(out) == digests(tmp_path / "whole")


def test_a_library_leaves_handlers_alone(pico, tmp_path):
    seen = []

    def look(progress):
        seen.append([signal.getsignal(n) for n in SIGNALS])

    before = [signal.getsignal(n) for n in SIGNALS]
    halve.prune(
        pico("llama"), tmp_path / "out", solver="magnitude", device="cpu", progress=look
    )
    assert seen
    assert all(handlers == before for handlers in seen)


def test_what_is_ignored_stays_ignored(command, tmp_path, monkeypatch):
    """So that `halve prune ... &` outlives the ^C for what is in the foreground."""
    words = command("prune")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 2, signal.SIGINT)
        assert _run([*words, "-o", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_of_its_own_exits_so(number, tmp_path):
    out = tmp_path / "out"
    words = ["prune", str(BUNDLED), "-o", str(out), "--solver", "sparsegpt"]
    words += ["--calibration", "stdlib", "--samples", "4", "--seq-len", "64"]
    process = _started(words)
    _wait_for(process, "block 2 of 6: solving")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[number]
    assert errors.strip().splitlines()[-1].endswith(f": halve {' '.join(words)}")
    assert "Traceback" not in errors
    assert not out.exists()
    assert (out.with_name("out.partial") / "ledger.jsonl").is_file()


def _started(words) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "halve", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


def test_of_two_runs_the_second_refuses(tmp_path):
    """The lock holds between processes, and dies with its own."""
    out = tmp_path / "out"
    words = ["prune", str(BUNDLED), "-o", str(out), "--solver", "sparsegpt"]
    words += ["--calibration", "stdlib", "--samples", "4", "--seq-len", "64"]
    first = _started(words)
    _wait_for(first, "block 2 of 6: solving")
    first.send_signal(signal.SIGSTOP)
    before = _contents(tmp_path)
    second = _started(words)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "Another run is at work" in errors
    assert str(out) in errors
    assert _contents(tmp_path) == before
    first.kill()
    first.communicate()
    third = _started(words)
    third.communicate(timeout=120)
    assert third.returncode == 0
    assert halve.verify(out).sound


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
