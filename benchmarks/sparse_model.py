"""Claims: a packed model decodes faster than dense, and loads in its own size.

A random Llama of 1.2 billion parameters with 50 % zeros, by `halve bench`: tokens a
second, packed against Halve's own dense kernel and against torch, in interleaved
rounds; and the peak memory of loading and running it packed. Prints each claim and
whether it held; exits with 1 where one did not. Takes about seven minutes, 8 GiB of
memory and 4 GiB of disk.
"""

import argparse
import json
import statistics
import subprocess
import sys

from machine import describe_machine

# (test, rival, times as fast at least).
CLAIMS = (
    ("tg32", "halve dense", 1.5),
    ("tg32", "torch", 2.2),
    ("tg32 x4", "torch", 1.5),
    ("tg32 x16", "torch", 1.15),
    ("pp512", "torch", 0.95),
)
MEMORY = 1.15  # times the packed bytes, beside the interpreter


def main() -> int:
    """Print the claims; 1 where one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.2b")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    command = [sys.executable, "-m", "halve", "bench", "--random-llama", options.size]
    command += ["--tg", "32", "--rounds", str(options.rounds), "--output", "json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record = json.loads(done.stdout)
    print(describe_machine())
    print(
        f"{record['model']}; kernel {record['kernel']}, "
        f"{record['bandwidth'] / 1e9:.1f} GB/s read from memory"
    )
    held = [claim(record, *row) for row in CLAIMS] + [memory(record)]
    return int(not all(held))


def claim(record: dict, test: str, rival: str, least: float) -> bool:
    """Print one ratio of speeds, with those of each round, and whether it is enough."""
    times = {r["backend"]: r["seconds"] for r in record["results"] if r["test"] == test}
    packed = times["halve packed"]
    ratio = statistics.median(times[rival]) / statistics.median(packed)
    rounds = sorted(a / b for a, b in zip(times[rival], packed, strict=True))
    print(
        f"{test}: {ratio:.2f} times {rival} (rounds {rounds[0]:.2f} to "
        f"{rounds[-1]:.2f}); at least {least}: {verdict(ratio >= least)}"
    )
    return ratio >= least


def memory(record: dict) -> bool:
    """Print the memory that loading and running take, and if that is little enough.

    Loading alone maps the files; only what has run has read all of them.
    """
    found, size = record["footprints"]["packed"], record["sizes"]["halve packed"]
    loaded, run = ((found[n] - found["interpreter"]) / size for n in ("loaded", "run"))
    print(
        f"memory: {loaded:.3f} times the packed {size / 2**20:.0f} MiB when loaded, "
        f"{run:.3f} when run, beside the interpreter's "
        f"{found['interpreter'] / 2**20:.0f} MiB; at most {MEMORY}: "
        f"{verdict(run <= MEMORY)}"
    )
    return run <= MEMORY


def verdict(held: bool) -> str:
    """Return a word for the table."""
    return "held" if held else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
