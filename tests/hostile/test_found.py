"""Inputs that fuzzing found, as they were; and a short run of the fuzzer's targets.

The parsers are in `tests/fuzz`. A new finding is one row: the parser and the input.
"""

import base64
import random

import pytest

from tests.fuzz.judge import judge
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

# A pickle in which two tensors of different dtypes have one storage: the second was
# bfloat16 when described, and float32 when read.
TWO_DTYPES = (
    b"p\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02"
    b"((X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
    b"X\x03\x00\x00\x00cpuq\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08K\x03K\x01\x86q\t\x89"
    b"ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x08\x00\x00\x00b.weightq\x0e"
    b"h\x02((h\x03ctorch\nBFloat16Storage\nq\x0fX\x01\x00\x00\x000q\x10h\x06K\x04tq\x11Q"
    b"K\x00K\x04\x85q\x12K\x01\x85q\x13\x89h\n)Rq\x14tq\x15Rq\x16u."
)
# A footer that crashes the process when pyarrow is asked for the offset of a column.
HISTOGRAM = base64.b85decode(
    "P(e~L761SL|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NjIP<N*~jOce$d01^NIawGu&003cQ"
    "0001D{s91n0RR*N0002PsTBql3>6Gq6$TXm6$TX$6$BLk5*#xCC<4Q&7y)4s;SmM^00sd910(<y1Qjq9"
    "ZA=vg6#x<d02l-T00{v+0ssI200000762#+0{{R3000007zhCX00000000pY000060RjUg02KroJT(9q"
    "26JO*Wo=;<1OOEbBmx)&bY*ySB>+qu0000L1SJ9(0d4>m1{oX~EG7UP6$}|Q00s~l7zA`>cytv476um7"
    "0v4hHCRip295w(b0>h~o0bvml02wS51Qh@k0ss{N6%Z8y06Z4V0T~7vCIAKi001Tc92Eo^H2?+>85jX>"
    "6#^Cp7T^IE-T@}`0Vb*e92f`#000000000O2mt^90000002Tl!2m=5B0000002l}X000000000H5dax1"
    "6$BLk6#@Vi02L4w0suTI1{o#*1^@s67PJHw1||p=fCB&-92g8iQc_P>I&))aWo=;?>;W$?FE1}PXF)+h"
    "K~X_LK|w)5K}$hFcR@mDK}JDAXF)?}K|w)5K|(@7K}|tHK|w=7K}kVDK|w-6K}kVDK|w-6K|w)5NkKtD"
    "LQO$IK|w-6K|w)HdM__8I6*-{MMFhFK|w)6cR@ixK}A79K|w)5K|w)5ML|J9LUlnwK|w=7K}|tHXF)=D"
    "K}kVDK|w)5K|w)PK|w)5K~X_MQ9(mNK}SJBV?jhgK|w)6K|w`9K|w)5K|w)LRZ&4fK|x4CK|w)5Q9(gL"
    "K|w)5K|w-6K|w)CLTqJ7Q9(gLK|w-6K}A79Q9(gLK|KH%AaG%Fadl;MEn{$SEn#wUZ+9SeWpZ<AZ*Cwm"
    "HZCwOF&Qiz000~S000#N002-yQZW"
)
FOUND = {
    "one storage, two dtypes": ("pickle", TWO_DTYPES),
    "a footer that crashes pyarrow": ("parquet", HISTOGRAM),
}


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_read(name):
    """Otherwise fuzzing would not get past the first check."""
    for seed in TARGETS[name].seeds():
        assert TARGETS[name].attempt(seed) is not None


@pytest.mark.parametrize("row", FOUND)
def test_findings_stay_fixed(row):
    name, data = FOUND[row]
    verdict = judge(lambda: TARGETS[name].attempt(data), len(data))
    assert verdict.is_good, verdict


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name):
    """A small sample of what benchmarks/hostile.py tries."""
    rng = random.Random(name)
    target, seeds = TARGETS[name], TARGETS[name].seeds()
    target.attempt(seeds[0])  # import once, not in each child
    for data in [mutated(rng.choice(seeds), rng) for _ in range(10)]:
        verdict = judge(lambda data=data: target.attempt(data), len(data))
        assert verdict.is_good, (verdict, data)
