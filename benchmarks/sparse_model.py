"""Claims: a packed model decodes faster than dense, and takes little more memory.

Runs `halve bench` on a random Llama of 1.2 billion parameters with 50 % zeros. It
measures tokens per second, packed against dense with Halve's kernel and with torch, in
interleaved rounds, and the peak memory of loading and running the packed model. Prints
whether each claim held, and exits with 1 if one did not. Takes about seven minutes,
8 GiB of memory and 4 GiB of disk.
"""

import argparse
import json
import statistics
import subprocess
import sys

from machine import describe_machine

# (test, rival, least ratio of speeds).
CLAIMS = (
    ("tg32", "halve dense", 1.5),
    ("tg32", "torch", 2.2),
    ("tg32 x4", "torch", 1.5),
    ("tg32 x16", "torch", 1.15),
    ("pp512", "torch", 0.95),
)
MAX_MEMORY = 1.15  # times the packed bytes, in addition to the interpreter


def main() -> int:
    """Check all claims; return 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.2b")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    command = [sys.executable, "-m", "halve", "bench", "--random-llama", options.size]
    command += ["--tg", "32", "--rounds", str(options.rounds), "--output", "json"]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record = json.loads(finished.stdout)
    print(describe_machine())
    print(
        f"{record['model']}; kernel {record['kernel']}, "
        f"{record['bandwidth'] / 1e9:.1f} GB/s read from memory"
    )
    held = [claim(record, *row) for row in CLAIMS] + [memory(record)]
    return int(not all(held))


def claim(record: dict, test: str, rival: str, minimum: float) -> bool:
    """Print one ratio of speeds, its range over rounds, and whether it is enough."""
    times = {r["backend"]: r["seconds"] for r in record["results"] if r["test"] == test}
    packed = times["halve packed"]
    ratio = statistics.median(times[rival]) / statistics.median(packed)
    rounds = sorted(a / b for a, b in zip(times[rival], packed, strict=True))
    print(
        f"{test}: {ratio:.2f} times {rival} (rounds {rounds[0]:.2f} to "
        f"{rounds[-1]:.2f}); at least {minimum}: {verdict(ratio >= minimum)}"
    )
    return ratio >= minimum


def memory(record: dict) -> bool:
    """Print the memory of loading and of running, and whether it is within the limit.

    Loading only maps the files into memory; running reads all of them.
    """
    footprints, size = record["footprints"]["packed"], record["sizes"]["halve packed"]
    loaded, run = (
        (footprints[n] - footprints["interpreter"]) / size for n in ("loaded", "run")
    )
    print(
        f"memory: {loaded:.3f} times the packed {size / 2**20:.0f} MiB when loaded, "
        f"{run:.3f} when run, in addition to the interpreter's "
        f"{footprints['interpreter'] / 2**20:.0f} MiB; at most {MAX_MEMORY}: "
        f"{verdict(run <= MAX_MEMORY)}"
    )
    return run <= MAX_MEMORY


def verdict(held: bool) -> str:
    """Return the word that is printed for a claim."""
    return "held" if held else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
