"""SIGINT and SIGTERM: exit code, message, and the same bytes after resuming."""

import os
import signal
import sys
from pathlib import Path

import pytest

import halve
from halve.checkpoint import Workspace
from halve.cli import main
from tests.interruptions import digests
from tests.separate_process import start_halve
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


# A run that can be stopped while it works on the second of six blocks.
LONG = ["prune", str(BUNDLED), "--solver", "sparsegpt", "--calibration", "stdlib"]
LONG += ["--samples", "4", "--seq-len", "64"]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_exit_code_of_a_separate_process(number, tmp_path):
    out = tmp_path / "out"
    arguments = [*LONG, "-o", str(out)]
    process = start_halve(tmp_path / "process", arguments)
    process.wait_for("block 2 of 6: solving")
    process.send_signal(number)
    ended = process.finish()
    assert ended.returncode == SIGNALS[number]
    message = ended.stderr.strip().splitlines()[-1]
    assert message.endswith(f": halve {' '.join(arguments)}")
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert (out.with_name("out.partial") / "ledger.jsonl").is_file()


def test_a_second_run_with_the_same_output_is_refused(tmp_path):
    """The lock excludes other processes, and ends with the process that holds it."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    out = folder / "out"
    arguments = [*LONG, "-o", out]
    first = start_halve(tmp_path / "first", arguments)
    first.wait_for("block 2 of 6: solving")
    first.send_signal(signal.SIGSTOP)
    before = _contents(folder)
    second = start_halve(tmp_path / "second", arguments).finish()
    assert second.returncode == 1
    assert "Another run is writing to" in second.stderr
    assert str(out) in second.stderr
    assert _contents(folder) == before
    first.send_signal(signal.SIGKILL)
    assert first.finish().returncode == -signal.SIGKILL
    third = start_halve(tmp_path / "third", arguments).finish()
    assert third.returncode == 0
    assert halve.verify(out).sound


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
