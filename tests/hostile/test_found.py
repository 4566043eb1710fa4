"""What fuzzing found, each input kept as it was; and that fuzzing finds its way.

`tests/fuzz` has the readers. A new find is one row: the reader, and the input.
"""

import random

import pytest

from tests.fuzz.judge import judge
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

FOUND: dict[str, tuple[str, bytes]] = {}


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_are_read(name):
    """Else nothing behind the first check would ever be fuzzed."""
    for seed in TARGETS[name].seeds():
        assert TARGETS[name].attempt(seed) is not None


@pytest.mark.parametrize("row", FOUND)
def test_finds_stay_mended(row):
    name, data = FOUND[row]
    verdict = judge(lambda: TARGETS[name].attempt(data), len(data))
    assert verdict.is_good, verdict


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name):
    """A few of what benchmarks/hostile.py tries."""
    rng = random.Random(name)
    target, seeds = TARGETS[name], TARGETS[name].seeds()
    target.attempt(seeds[0])  # so that what it imports is not imported in each child
    for data in [mutated(rng.choice(seeds), rng) for _ in range(10)]:
        verdict = judge(lambda data=data: target.attempt(data), len(data))
        assert verdict.is_good, (verdict, data)
