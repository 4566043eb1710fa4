"""SIGINT and SIGTERM: exit code, message, and the same bytes after resuming."""

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
    """Set the handlers of a foreground process, wherever the tests run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(pico, tmp_path):
    """Return a function that returns the arguments of a command, without `-o OUT`."""

    def arguments(verb: str) -> list[str]:
        prune = ["prune", str(pico("llama")), "--solver", "magnitude"]
        if verb == "prune":
            return prune
        source = tmp_path / "source"
        packed = ["--pack"] if verb == "unpack" else []
        _run([*prune, "-o", str(source), *packed])
        return [verb, str(source)]

    return arguments


def _run(arguments) -> int:
    """Run a command in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["halve", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("it did not exit")


def signal_at(patch, count, number):
    """Send this process a signal while it writes its count-th shard."""
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
def test_a_run_ended_by_a_signal_can_be_resumed(
    verb, number, command, tmp_path, monkeypatch, capsys
):
    arguments = command(verb)
    assert _run([*arguments, "-o", str(tmp_path / "whole")]) == 0
    handlers = [signal.getsignal(n) for n in SIGNALS]
    for count in (1, 2, 3):
        out = tmp_path / f"out {count}"
        with monkeypatch.context() as patch:
            signal_at(patch, count, number)
            capsys.readouterr()
            assert _run([*arguments, "-o", str(out)]) == SIGNALS[number]
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"Interrupted by {signal.Signals(number).name}. ")
        assert message.endswith(f"halve {' '.join(arguments)} -o '{out}'")
        assert [signal.getsignal(n) for n in SIGNALS] == handlers
        assert not out.exists()
        partial = out.with_name(out.name + ".partial")
        ledger = (partial / "ledger.jsonl").read_text().count('"sha256"')
        assert ledger == count - 1
        assert not [*partial.glob(".*")]
        assert _run([*arguments, "-o", str(out)]) == 0
        assert digests(out) == digests(tmp_path / "whole")


def test_the_library_sets_no_handlers(pico, tmp_path):
    seen = []

    def record_handlers(progress):
        seen.append([signal.getsignal(n) for n in SIGNALS])

    before = [signal.getsignal(n) for n in SIGNALS]
    halve.prune(
        pico("llama"),
        tmp_path / "out",
        solver="magnitude",
        device="cpu",
        progress=record_handlers,
    )
    assert seen
    assert all(handlers == before for handlers in seen)


def test_an_ignored_signal_stays_ignored(command, tmp_path, monkeypatch):
    """So a background `halve prune ... &` survives the ^C for a foreground process."""
    arguments = command("prune")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 2, signal.SIGINT)
        assert _run([*arguments, "-o", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_exit_code_of_a_separate_process(number, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", str(BUNDLED), "-o", str(out), "--solver", "sparsegpt"]
    arguments += ["--calibration", "stdlib", "--samples", "4", "--seq-len", "64"]
    process = _start(arguments)
    _wait_for(process, "block 2 of 6: solving")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[number]
    assert errors.strip().splitlines()[-1].endswith(f": halve {' '.join(arguments)}")
    assert "Traceback" not in errors
    assert not out.exists()
    assert (out.with_name("out.partial") / "ledger.jsonl").is_file()


def _start(arguments) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "halve", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(process: subprocess.Popen[str], message: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if message in line:
            return
    raise AssertionError(f"it never printed {message!r}")


def test_a_second_run_with_the_same_output_is_refused(tmp_path):
    """The lock excludes other processes, and ends with the process that holds it."""
    out = tmp_path / "out"
    arguments = ["prune", str(BUNDLED), "-o", str(out), "--solver", "sparsegpt"]
    arguments += ["--calibration", "stdlib", "--samples", "4", "--seq-len", "64"]
    first = _start(arguments)
    _wait_for(first, "block 2 of 6: solving")
    first.send_signal(signal.SIGSTOP)
    before = _contents(tmp_path)
    second = _start(arguments)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "Another run is writing to" in errors
    assert str(out) in errors
    assert _contents(tmp_path) == before
    first.kill()
    first.communicate()
    third = _start(arguments)
    third.communicate(timeout=120)
    assert third.returncode == 0
    assert halve.verify(out).sound


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
