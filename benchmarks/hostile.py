"""Claim: no damaged or hostile file makes a reader crash, hang or exceed its memory.

Mutates valid files of every kind at random, and reads each in a separate process. A
reader must either read the file or raise a HalveError, within twenty seconds and in
memory of twice the file's size plus 192 MiB. Prints the seed of each file for which it
does not, and exits with 1 if there is one.

    python benchmarks/hostile.py [--each 200] [--seed 0] [--only NAME]
"""

import argparse
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine

from tests.fuzz.judge import Verdict, judge
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

seeds_of = cache(lambda name: TARGETS[name].seeds())


def attempt(name: str, seed: int) -> Verdict:
    """Mutate one of a reader's valid files, and read it."""
    rng = random.Random(f"{name} {seed}")
    target = TARGETS[name]
    data = mutated(rng.choice(seeds_of(name)), rng)
    size = sum(len(contents) for contents in target.files(data).values())
    return judge(lambda: target.attempt(data), size)


def main() -> int:
    """Try all readers and print how many files each read or refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    options = parser.parse_args()
    print(describe_machine())
    bad = 0
    for name in [options.only] if options.only else TARGETS:
        seeds = range(options.seed, options.seed + options.each)
        verdicts = {seed: attempt(name, seed) for seed in seeds}
        counts = Counter(verdict.outcome for verdict in verdicts.values())
        peak = max(verdict.peak for verdict in verdicts.values())
        summary = ", ".join(
            f"{count} {outcome}" for outcome, count in sorted(counts.items())
        )
        print(f"{name}: {summary}; at most {peak / 2**20:.0f} MiB", flush=True)
        for seed, verdict in verdicts.items():
            if not verdict.is_good:
                bad += 1
                print(f"  seed {seed}: {verdict.outcome}: {verdict.detail}", flush=True)
    print(f"{bad} files were neither read nor refused")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
