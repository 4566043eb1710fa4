"""Claim: whatever stops a run, nothing is lost, and it is resumed to the same bytes.

Runs of the bundled model (pruned by several solvers, packed, unpacked) are disturbed,
and then called again until they end:

- killed by SIGKILL at random moments, some of them several times in a row;
- killed so through the command line, start-up included;
- on a disk that is full (a small tmpfs, where one may be mounted) at a random moment;
- with files that may not grow past a random size (RLIMIT_FSIZE);
- with every single step that changes the disk failing in its turn, half done.

It is a loss where a file but `halve.json`, which holds times, differs from those of
the undisturbed run; where the output folder holds anything but the whole; where a shard
that the ledger names is not whole, or is made anew; where `halve verify` finds
anything; where an error is not an OutputError; or where the model itself is touched.
Exits with 1 then.

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
# Of a hundred kills, so many go to each kind of run.
SHARES = {
    "magnitude": 35,
    "sparsegpt": 20,
    "sparsegpt, packed": 10,
    "allocated": 3,
    "auto, refined": 2,
    "pack": 15,
    "unpack": 15,
}
COMMAND_LINE_KILLS = 6
# How often one run is killed before it may end.
IN_A_ROW = 3


@dataclass(frozen=True)
class Kind:
    """A run that is disturbed.

    Attributes:
        name: Of the row.
        call: Given an output folder and what is told of progress, runs it.
        expected: File -> SHA-256 of the undisturbed run.
        seconds: That it took.
    """

    name: str
    call: Callable[..., object]
    expected: dict[str, str]
    seconds: float


@dataclass
class Losses:
    """What has been lost so far, in words."""

    found: list[str] = field(default_factory=list)

    def check(self, kept: bool, words: str) -> None:
        """Note a loss where something was not kept."""
        if not kept:
            self.found.append(words)
            print(f"LOST: {words}")


def digests(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256, without the record."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "halve.json"
    }


def forked(work: Callable[[], object]) -> int:
    """Start a process that works with all modules loaded; return its number."""
    if number := os.fork():
        return number
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
    except BaseException:  # noqa: BLE001  (a process that was forked must not go on)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(number: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed(number: int, seconds: float) -> bool:
    """Kill a process after some time; return whether it was still at work."""
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    return finished(number) == -signal.SIGKILL


def kinds(folder: Path) -> list[Kind]:
    """Return the runs, each done once undisturbed."""
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
    # Here, so that processes which are forked later have all modules loaded.
    for name in ("sparsegpt", "magnitude", "pack"):
        calls[name](folder / f"{name}-first")
    return [undisturbed(folder, name, call) for name, call in calls.items()]


def undisturbed(folder: Path, name: str, call: Callable[..., object]) -> Kind:
    """Do a run, in a process of its own, and keep what came of it."""
    started = time.perf_counter()
    assert finished(forked(partial(call, folder / name))) == DONE, name
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.2f} s undisturbed")
    return Kind(name, call, digests(folder / name), seconds)


def in_ledger(out: Path, losses: Losses, words: str) -> dict[str, tuple[int, int]]:
    """Return shard -> which file it is, of those that an unfinished run vouches for."""
    partial_ = out.with_name(f"{out.name}.partial")
    ledger = partial_ / "ledger.jsonl"
    whole = ledger.read_bytes().rpartition(b"\n")[0] if ledger.is_file() else b""
    lines = [json.loads(line) for line in whole.splitlines()]
    shards = {line["file"]: line["sha256"] for line in lines if "sha256" in line}
    for name, digest in shards.items():
        found = sha256((partial_ / name).read_bytes()).hexdigest()
        losses.check(found == digest, f"{words}: {name} was taken for whole")
    return {name: which(partial_ / name) for name in shards}


def which(path: Path) -> tuple[int, int]:
    """Return what a file has for itself that another of its name has not."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def check_resumed(kind: Kind, out: Path, losses: Losses, words: str) -> None:
    """Call a run again, and look at what it leaves."""
    if out.exists() and any(out.iterdir()):
        losses.check(digests(out) == kind.expected, f"{words}: OUT is not whole")
    done = in_ledger(out, losses, words)
    code = finished(forked(partial(kind.call, out)))
    losses.check(code == DONE, f"{words}: it did not resume")
    if code == DONE:
        check_whole(kind, out, done, losses, words)


def check_whole(
    kind: Kind, out: Path, done: dict[str, tuple[int, int]], losses: Losses, words: str
) -> None:
    """Look at the output of a run that has ended."""
    losses.check(digests(out) == kind.expected, f"{words}: other bytes")
    anew = [name for name, file in done.items() if which(out / name) != file]
    losses.check(not anew, f"{words}: {anew} were made anew")
    losses.check(halve.verify(out).sound, f"{words}: verify finds something")
    left = out.with_name(f"{out.name}.partial")
    losses.check(not left.exists(), f"{words}: {left} is left")


def kill(
    kind: Kind, kills: int, folder: Path, rng: random.Random, losses: Losses
) -> None:
    """Kill a kind of run so many times, in rows of up to three."""
    done = rounds = 0
    while done < kills:
        out = folder / f"{kind.name}-{rounds}"
        rounds += 1
        words = f"{kind.name}, killed"
        for _ in range(rng.randint(1, min(IN_A_ROW, kills - done))):
            moment = rng.uniform(0, kind.seconds)
            if not killed(forked(partial(kind.call, out)), moment):
                break  # it had ended by itself, which is not counted
            done += 1
            words += f" after {moment:.2f} s"
        check_resumed(kind, out, losses, words)
    print(f"{kind.name}: {done} kills in {rounds} runs")


def kill_commands(kills: int, folder: Path, rng: random.Random, losses: Losses) -> None:
    """Kill the command line at random moments, its start included."""
    prune = [sys.executable, "-m", "halve", "prune", str(BUNDLED), "--quiet"]
    prune += ["--solver", "magnitude", "--pack", "-o"]
    started = time.perf_counter()
    subprocess.run([*prune, folder / "line"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    call = partial(halve.prune, BUNDLED, solver="magnitude", packed=True)
    kind = Kind("command line", call, digests(folder / "line"), seconds)
    done = 0
    while done < kills:
        out, moment = folder / f"line-{done}", rng.uniform(0.3, 1) * seconds
        process = subprocess.Popen([*prune, out], stdout=subprocess.DEVNULL)
        was_at_work = killed(process.pid, moment)
        process.returncode = 0  # it has been waited for
        done += was_at_work
        check_resumed(kind, out, losses, f"command line, killed after {moment:.2f} s")
    print(f"command line: {done} kills ({seconds:.2f} s undisturbed)")


def limited(kind: Kind, out: Path, limit: int) -> None:
    """Do a run whose files may not grow past a size: EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    kind.call(out)


def crowded(kind: Kind, out: Path, left: int, ballast: Path) -> None:
    """Do a run whose disk has little room from its first report on: ENOSPC."""

    def fill(_: object) -> None:
        if not ballast.exists():
            status = os.statvfs(out.parent)
            size = status.f_bavail * status.f_frsize - left
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))

    kind.call(out, progress=fill)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a tmpfs on a folder, if this process may; tell whether it could."""
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
    kind: Kind, count: int, place: Path, rng: random.Random, losses: Losses
) -> Counter[str]:
    """Let a kind of run fail by both limits in turn, as often as is asked for."""
    failed: Counter[str] = Counter()
    largest = sum(path.stat().st_size for path in BUNDLED.iterdir())
    with small_disk(place / "small", 3 * largest) as has_disk:
        ways = ("full disk", "file size") if has_disk else ("file size",)
        tries = 0
        while sum(failed.values()) < count:
            way = ways[tries % len(ways)]
            home = place / "small" if way == "full disk" else place
            out, ballast = home / f"{kind.name}-failed-{tries}", home / "ballast"
            size = int(largest * rng.random() ** 3)
            words = f"{kind.name}, {way}, {size} bytes"
            work = (
                partial(crowded, kind, out, size, ballast)
                if way == "full disk"
                else partial(limited, kind, out, size)
            )
            code = finished(forked(work))
            ballast.unlink(missing_ok=True)
            losses.check(code in (DONE, REFUSED), f"{words}: the wrong error")
            failed[way] += code == REFUSED
            check_resumed(kind, out, losses, words)
            subprocess.run(["rm", "-r", str(out)], check=False)
            tries += 1
    return failed


def fail_every_step(kind: Kind, folder: Path, losses: Losses) -> int:
    """Let each step that changes the disk fail in its turn; return how many did."""
    count = 0
    while True:
        out = folder / f"{kind.name}-step-{count + 1}"
        code = finished(forked(partial(failing, kind, out, count + 1)))
        if code == DONE:
            return count
        count += 1
        words = f"{kind.name}, step {count}"
        losses.check(code == REFUSED, f"{words}: the wrong error")
        check_resumed(kind, out, losses, words)


def failing(kind: Kind, out: Path, count: int) -> None:
    """Do a run in which one step fails, half done where it brings data."""
    taken = 0

    def each(step: Callable[..., None], *arguments: object) -> None:
        nonlocal taken
        taken += 1
        if taken == count:
            half_done(step, *arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        step(*arguments)

    for name, step in inspect.getmembers(disk, inspect.isfunction):
        if step.__module__ == disk.__name__ and not name.startswith("_"):
            setattr(disk, name, partial(each, step))
    kind.call(out)


def half_done(step: Callable[..., None], *arguments: object) -> None:
    """Take a step with half of its data, if it has any."""
    match arguments:
        case (path, bytes(data)):
            step(path, data[: len(data) // 2])
        case (Path() as path, dict()):
            step(*arguments)
            os.truncate(path, path.stat().st_size // 2)


def main() -> int:
    """Disturb, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--failures", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A process that forks must have no threads.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(describe_machine())
    rng, losses, started = random.Random(options.seed), Losses(), time.perf_counter()
    model = digests(BUNDLED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = kinds(folder)
        for run in runs:
            share = -(-SHARES[run.name] * options.kills // 100)
            kill(run, share, folder, rng, losses)
        kill_commands(COMMAND_LINE_KILLS, folder, rng, losses)
        failed: Counter[str] = Counter()
        for run in (runs[0], runs[5], runs[6]):
            place = folder / f"failures of {run.name}"
            place.mkdir()
            each = -(-options.failures // 3)
            failed += fail_writes(run, each, place, rng, losses)
        steps = fail_every_step(runs[0], folder, losses)
        steps += fail_every_step(runs[5], folder, losses)
    losses.check(digests(BUNDLED) == model, "the model itself has changed")
    kills = sum(-(-share * options.kills // 100) for share in SHARES.values())
    by_way = ", ".join(f"{count} by {way}" for way, count in sorted(failed.items()))
    print(
        f"{kills + COMMAND_LINE_KILLS} kills; {sum(failed.values())} failed writes "
        f"({by_way}); {steps} failed steps; {len(losses.found)} losses; "
        f"{time.perf_counter() - started:.0f} s"
    )
    return int(bool(losses.found))


if __name__ == "__main__":
    sys.exit(main())
