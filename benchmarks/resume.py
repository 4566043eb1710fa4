"""Claim: killed at any instant, a run is resumed to the same bytes.

Prunes the bundled model once undisturbed; then again and again, each time killed with
SIGKILL at a random moment of the undisturbed run's length and started anew until it is
done. Exits with 1 where any file but `halve.json`, which holds times, differs.

    python benchmarks/resume.py [--kills 20] [--seed 0]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from machine import describe_machine

import halve

BUNDLED = Path(halve.__file__).parent / "data/pycode-opt"


def command(out: Path) -> list[str]:
    """Return the command that prunes the bundled model."""
    prune = [sys.executable, "-m", "halve", "prune", str(BUNDLED), "-o", str(out)]
    return [*prune, "--calibration", "stdlib", "--quiet"]


def digests(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256, without the record."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "halve.json"
    }


def killed(out: Path, seconds: float) -> bool:
    """Start a run and kill it after some time; return whether it was still at work."""
    with subprocess.Popen(command(out), stdout=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(describe_machine())
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = time.perf_counter()
        subprocess.run(command(folder / "whole"), check=True, stdout=subprocess.DEVNULL)
        length = time.perf_counter() - begun
        expected = digests(folder / "whole")
        kills, different = 0, 0
        while kills < options.kills:
            out = folder / f"out-{kills}"
            moment = rng.uniform(0, length)
            if not killed(out, moment):
                continue
            kills += 1
            subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
            same = digests(out) == expected
            different += not same
            print(f"killed after {moment:.2f} s: {'same' if same else 'DIFFERENT'}")
    print(f"undisturbed {length:.1f} s; {kills} kills, {different} differences")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
