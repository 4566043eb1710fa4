"""What fuzzing found, each input kept as it was; and that fuzzing finds its way.

`tests/fuzz` has the readers. A new find is one row: the reader, and the input.
"""

import random

import pytest

from tests.fuzz.judge import judge
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

# A pickle in which two tensors of different dtypes share one storage: described, the
# second was bfloat16, and read, it was float32.
TWO_DTYPES = (
    b"p\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    b"((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
    b"X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\t\x89"
    b"ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x08\x00\x00\x00b.weightq\x0e"
    b"h\x02((h\x03ctorch\nBFloat16Storage\nq\x0fX\x01\x00\x00\x000q\x10h\x06K\x04tq\x11Q"
    b"K\x00K\x04\x85q\x12K\x01\x85q\x13\x89h\n)Rq\x14tq\x15Rq\x16u."
)
FOUND = {"one storage, two dtypes": ("pickle", TWO_DTYPES)}


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
