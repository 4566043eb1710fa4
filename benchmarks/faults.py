"""Claim: whatever interrupts a run, it resumes to the same bytes and loses nothing.

Runs on the bundled model (pruning with several solvers, packing, unpacking) are
interrupted in several ways, then rerun until they finish:

- by SIGKILL at random moments, some runs several times in a row;
- by SIGKILL of the command line, its start-up included;
- by a full disk (a small tmpfs, where one can be mounted) at a random moment;
- by a random limit on the size of files (RLIMIT_FSIZE);
- by an error in each single step that changes the disk, after half of its data.

Reports a loss where a file other than `halve.json`, which holds times, differs from the
uninterrupted run; where the output folder exists before it is complete; where a shard
that the ledger names is damaged or is written again; where `halve verify` reports a
problem; where an error is not an OutputError; or where the source model has changed.
Exits with 1 if there is any loss.

    python benchmarks/faults.py [--kills 100] [--failures 60] [--seed 0]
"""

import argparse
import errno
import inspect
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from machine import describe_machine

import halve
from halve.checkpoint import disk
from halve.errors import HalveError, OutputError

BUNDLED = Path(halve.__file__).parent / "data/pycode-opt"
DONE, REFUSED, WRONG = 0, 3, 4
# Kills of each scenario, out of a hundred.
KILLS = {
    "magnitude": 35,
    "sparsegpt": 20,
    "sparsegpt, packed": 10,
    "allocated": 3,
    "auto, refined": 2,
    "pack": 15,
    "unpack": 15,
}
COMMAND_LINE_KILLS = 6
# The most kills of one run before it may finish.
MAX_IN_A_ROW = 3


@dataclass(frozen=True)
class Scenario:
    """A run that is interrupted.

    Attributes:
        name: Its name in the output.
        call: Runs it, given an output folder and optionally a `progress` callback.
        expected: File name -> SHA-256 of the uninterrupted run.
        seconds: Duration of the uninterrupted run.
    """

    name: str
    call: Callable[..., object]
    expected: dict[str, str]
    seconds: float


@dataclass
class Losses:
    """Descriptions of all losses so far."""

    messages: list[str] = field(default_factory=list)

    def check(self, holds: bool, message: str) -> None:
        """Record and print a loss unless the condition holds."""
        if not holds:
            self.messages.append(message)
            print(f"LOST: {message}")


def digests(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of a folder, without the record."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "halve.json"
    }


def forked(work: Callable[[], object]) -> int:
    """Fork a process that does some work with all modules loaded; return its PID."""
    if pid := os.fork():
        return pid
    code = WRONG
    try:
        work()
        code = DONE
    except OutputError as error:
        code = REFUSED if "could not be written" in str(error) else WRONG
        if code == WRONG:
            print(error)
    except HalveError as error:
        print(error)
    except BaseException:  # noqa: BLE001  (the forked process must not return)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(pid: int, seconds: float) -> bool:
    """Kill a process after some time; return whether it was still running."""
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return exit_code(pid) == -signal.SIGKILL


def make_scenarios(folder: Path) -> list[Scenario]:
    """Return all scenarios, after running each once without interruption."""
    text = folder / "text.txt"
    text.write_text(inspect.getsource(argparse) + inspect.getsource(subprocess))
    prune = partial(
        halve.prune, BUNDLED, calibration=str(text), samples=4, seq_len=64, device="cpu"
    )
    allocated = {"sparsity": 0.63, "allocation": "error", "solver": "sparsegpt"}
    calls: dict[str, Callable[..., object]] = {
        "magnitude": partial(prune, solver="magnitude"),
        "sparsegpt": partial(prune, solver="sparsegpt"),
        "sparsegpt, packed": partial(prune, solver="sparsegpt", packed=True),
        "allocated": partial(prune, **allocated),
        "auto, refined": partial(prune, refine=True, epochs=1),
        "pack": partial(halve.pack, folder / "magnitude-first"),
        "unpack": partial(halve.unpack, folder / "pack-first"),
    }
    # Run in this process, so that processes forked later have all modules loaded.
    for name in ("sparsegpt", "magnitude", "pack"):
        calls[name](folder / f"{name}-first")
    return [uninterrupted(folder, name, call) for name, call in calls.items()]


def uninterrupted(folder: Path, name: str, call: Callable[..., object]) -> Scenario:
    """Run a scenario to its end in a separate process, and record its outputs."""
    started = time.perf_counter()
    assert exit_code(forked(partial(call, folder / name))) == DONE, name
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.2f} s uninterrupted")
    return Scenario(name, call, digests(folder / name), seconds)


def committed_shards(
    out: Path, losses: Losses, context: str
) -> dict[str, tuple[int, int]]:
    """Return shard -> file identity, for the shards in an unfinished run's ledger."""
    partial_ = out.with_name(f"{out.name}.partial")
    ledger = partial_ / "ledger.jsonl"
    complete = ledger.read_bytes().rpartition(b"\n")[0] if ledger.is_file() else b""
    lines = [json.loads(line) for line in complete.splitlines()]
    shards = {line["file"]: line["sha256"] for line in lines if "sha256" in line}
    for name, digest in shards.items():
        actual = sha256((partial_ / name).read_bytes()).hexdigest()
        losses.check(actual == digest, f"{context}: the committed {name} is damaged")
    return {name: identity(partial_ / name) for name in shards}


def identity(path: Path) -> tuple[int, int]:
    """Return inode and modification time, which change when a file is written again."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def check_resumed(scenario: Scenario, out: Path, losses: Losses, context: str) -> None:
    """Rerun an interrupted scenario, and check what it leaves."""
    if out.exists() and any(out.iterdir()):
        complete = digests(out) == scenario.expected
        losses.check(complete, f"{context}: the output folder is incomplete")
    committed = committed_shards(out, losses, context)
    code = exit_code(forked(partial(scenario.call, out)))
    losses.check(code == DONE, f"{context}: it did not resume")
    if code == DONE:
        check_complete(scenario, out, committed, losses, context)


def check_complete(
    scenario: Scenario,
    out: Path,
    committed: dict[str, tuple[int, int]],
    losses: Losses,
    context: str,
) -> None:
    """Check the output of a run that has exit_code."""
    losses.check(digests(out) == scenario.expected, f"{context}: the bytes differ")
    rewritten = [n for n, file in committed.items() if identity(out / n) != file]
    losses.check(not rewritten, f"{context}: {rewritten} were written again")
    losses.check(halve.verify(out).sound, f"{context}: verify reports a problem")
    remains = out.with_name(f"{out.name}.partial")
    losses.check(not remains.exists(), f"{context}: {remains} was not removed")


def kill(
    scenario: Scenario, kills: int, folder: Path, rng: random.Random, losses: Losses
) -> None:
    """Kill runs of a scenario a number of times, up to three times each."""
    done = rounds = 0
    while done < kills:
        out = folder / f"{scenario.name}-{rounds}"
        rounds += 1
        context = f"{scenario.name}, killed"
        for _ in range(rng.randint(1, min(MAX_IN_A_ROW, kills - done))):
            moment = rng.uniform(0, scenario.seconds)
            if not killed(forked(partial(scenario.call, out)), moment):
                break  # it had exit_code before, which does not count
            done += 1
            context += f" after {moment:.2f} s"
        check_resumed(scenario, out, losses, context)
    print(f"{scenario.name}: {done} kills in {rounds} runs")


def kill_commands(kills: int, folder: Path, rng: random.Random, losses: Losses) -> None:
    """Kill the command line at random moments, its start-up included."""
    prune = [sys.executable, "-m", "halve", "prune", str(BUNDLED), "--quiet"]
    prune += ["--solver", "magnitude", "--pack", "-o"]
    started = time.perf_counter()
    subprocess.run([*prune, folder / "line"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    call = partial(halve.prune, BUNDLED, solver="magnitude", packed=True)
    scenario = Scenario("command line", call, digests(folder / "line"), seconds)
    done = 0
    while done < kills:
        out, moment = folder / f"line-{done}", rng.uniform(0.3, 1) * seconds
        process = subprocess.Popen([*prune, out], stdout=subprocess.DEVNULL)
        was_running = killed(process.pid, moment)
        process.returncode = 0  # `killed` has waited for it
        done += was_running
        check_resumed(
            scenario, out, losses, f"command line, killed after {moment:.2f} s"
        )
    print(f"command line: {done} kills ({seconds:.2f} s uninterrupted)")


def with_size_limit(scenario: Scenario, out: Path, limit: int) -> None:
    """Run a scenario with a limit on the size of files, in bytes: EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    scenario.call(out)


def with_full_disk(scenario: Scenario, out: Path, free: int, ballast: Path) -> None:
    """Run a scenario that has `free` bytes of disk from its first report on: ENOSPC."""

    def fill(_: object) -> None:
        if not ballast.exists():
            status = os.statvfs(out.parent)
            size = status.f_bavail * status.f_frsize - free
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))

    scenario.call(out, progress=fill)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs on a folder if permitted; yield whether it was mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True)
        ok = mounted.returncode == 0
    except OSError:
        ok = False
    try:
        yield ok
    finally:
        if ok:
            subprocess.run(["umount", str(folder)], check=True)


def fail_writes(
    scenario: Scenario, count: int, place: Path, rng: random.Random, losses: Losses
) -> Counter[str]:
    """Make runs of a scenario fail `count` times, by each limit in turn."""
    failed: Counter[str] = Counter()
    largest = sum(path.stat().st_size for path in BUNDLED.iterdir())
    with small_disk(place / "small", 3 * largest) as has_disk:
        causes = ("full disk", "file size") if has_disk else ("file size",)
        tries = 0
        while sum(failed.values()) < count:
            cause = causes[tries % len(causes)]
            home = place / "small" if cause == "full disk" else place
            out, ballast = home / f"{scenario.name}-failed-{tries}", home / "ballast"
            size = int(largest * rng.random() ** 3)
            context = f"{scenario.name}, {cause}, {size} bytes"
            work = (
                partial(with_full_disk, scenario, out, size, ballast)
                if cause == "full disk"
                else partial(with_size_limit, scenario, out, size)
            )
            code = exit_code(forked(work))
            ballast.unlink(missing_ok=True)
            losses.check(code in (DONE, REFUSED), f"{context}: an unexpected error")
            failed[cause] += code == REFUSED
            check_resumed(scenario, out, losses, context)
            subprocess.run(["rm", "-r", str(out)], check=False)
            tries += 1
    return failed


def fail_every_step(scenario: Scenario, folder: Path, losses: Losses) -> int:
    """Make each step that changes the disk fail in turn; return how many there are."""
    count = 0
    while True:
        out = folder / f"{scenario.name}-step-{count + 1}"
        code = exit_code(forked(partial(failing, scenario, out, count + 1)))
        if code == DONE:
            return count
        count += 1
        context = f"{scenario.name}, step {count}"
        losses.check(code == REFUSED, f"{context}: an unexpected error")
        check_resumed(scenario, out, losses, context)


def failing(scenario: Scenario, out: Path, failing_step: int) -> None:
    """Run a scenario in which one step fails, after half of its data if it has any."""
    steps = 0

    def each(step: Callable[..., None], *arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == failing_step:
            half_done(step, *arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        step(*arguments)

    for name, step in inspect.getmembers(disk, inspect.isfunction):
        if step.__module__ == disk.__name__ and not name.startswith("_"):
            setattr(disk, name, partial(each, step))
    scenario.call(out)


def half_done(step: Callable[..., None], *arguments: object) -> None:
    """Do a step with half of its data, or not at all if it has none."""
    match arguments:
        case (path, bytes(data)):
            step(path, data[: len(data) // 2])
        case (Path() as path, dict()):
            step(*arguments)
            os.truncate(path, path.stat().st_size // 2)


def main() -> int:
    """Interrupt, resume and compare all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--failures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A process that forks must not have other threads.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(describe_machine())
    rng, losses, started = random.Random(options.seed), Losses(), time.perf_counter()
    model = digests(BUNDLED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenarios = make_scenarios(folder)
        for scenario in scenarios:
            count = -(-KILLS[scenario.name] * options.kills // 100)
            kill(scenario, count, folder, rng, losses)
        kill_commands(COMMAND_LINE_KILLS, folder, rng, losses)
        failed: Counter[str] = Counter()
        for scenario in (scenarios[0], scenarios[5], scenarios[6]):
            place = folder / f"failures of {scenario.name}"
            place.mkdir()
            each = -(-options.failures // 3)
            failed += fail_writes(scenario, each, place, rng, losses)
        steps = fail_every_step(scenarios[0], folder, losses)
        steps += fail_every_step(scenarios[5], folder, losses)
    losses.check(digests(BUNDLED) == model, "the source model has changed")
    kills = sum(-(-count * options.kills // 100) for count in KILLS.values())
    by_cause = ", ".join(
        f"{count} by {cause}" for cause, count in sorted(failed.items())
    )
    print(
        f"{kills + COMMAND_LINE_KILLS} kills; {sum(failed.values())} failed writes "
        f"({by_cause}); {steps} failed steps; {len(losses.messages)} losses; "
        f"{time.perf_counter() - started:.0f} s"
    )
    return int(bool(losses.messages))


if __name__ == "__main__":
    sys.exit(main())
