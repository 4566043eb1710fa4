"""Processes of their own that need not import torch and transformers again.

Importing them takes longer than most commands on a tiny model. So a server imports them
once for each worker, and every process is forked from it: it has modules, but none of
the state of the tests, nor their signal handlers. Tests of what is imported, and of the
installed command, start an interpreter instead.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Elsewhere a process may not be forked once libraries have started threads.
_CONTEXT = multiprocessing.get_context(
    "forkserver" if sys.platform == "linux" else "spawn"
)
if sys.platform == "linux":
    _CONTEXT.set_forkserver_preload(["transformers.modeling_utils", "halve.api"])


class SeparateProcess:
    """A function that runs in a process of its own, with outputs in files.

    Attributes:
        pid: Its process id.
    """

    def __init__(
        self,
        folder: Path,
        function: Callable[..., None],
        *arguments: object,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            folder: For its outputs, `stdout` and `stderr`; created.
            function: What it runs, of the top level of a module.
            arguments: Of the function, to be pickled.
            variables: Environment variables beside those of this process.
        """
        folder.mkdir(parents=True)
        self._outputs = folder / "stdout", folder / "stderr"
        environment = os.environ | (variables or {})
        given = (self._outputs, environment, function, arguments)
        self._process = _CONTEXT.Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait_for(self, message: str, seconds: float = 300) -> None:
        """Wait until it has written a message to stderr."""
        end = time.monotonic() + seconds
        while message not in self._read(1):
            assert self._process.is_alive(), f"it never printed {message!r}"
            assert time.monotonic() < end, f"it has not printed {message!r} yet"
            time.sleep(0.01)

    def finish(self, seconds: float = 300) -> "subprocess.CompletedProcess[str]":
        """Wait for its end, and kill it if that takes too long."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()
            raise AssertionError(f"it did not end in {seconds} s: {self._read(1)}")
        return subprocess.CompletedProcess((), code, self._read(0), self._read(1))

    def _read(self, number: int) -> str:
        path = self._outputs[number]
        return path.read_text() if path.exists() else ""


def start_halve(
    folder: Path,
    arguments: Sequence[object],
    variables: Mapping[str, str] | None = None,
) -> SeparateProcess:
    """Start the command line of Halve."""
    words = [str(argument) for argument in arguments]
    return SeparateProcess(folder, _main, words, variables=variables)


def _main(arguments: list[str]) -> None:
    from halve.cli import main  # noqa: PLC0415  (only the process needs it)

    sys.argv = ["halve", *arguments]
    main()


def _run(
    outputs: tuple[Path, Path],
    environment: Mapping[str, str],
    function: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    """Run a function with redirected outputs; what it raises ends the process."""
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)
