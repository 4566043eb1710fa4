"""Store a pruned model in fewer bytes, or dense again."""

from collections.abc import Callable
from pathlib import Path

from halve.options import PackOptions
from halve.packing import pack_model, unpack_model
from halve.records import PackRecord, Progress


def pack(
    model: str | Path,
    out: str | Path,
    *,
    positive_zeros: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PackRecord:
    """Store each matrix of a pruned model as a bit mask and its nonzero weights.

    The new folder holds the same model in fewer bytes: at 50 % zeros, 16-bit matrices
    take 56.3 % of their dense size. It loads in transformers where Halve is installed,
    and runs without being unpacked; without Halve, transformers refuses it. A matrix
    that packing would not shrink (under about 6 % zeros in 16 bits) stays dense, as do
    embeddings, norms and the head. Every matrix is read back from the files and
    compared bit for bit.

    As with `prune`, `out` is either absent or complete, and the same call resumes after
    any interruption.

    Args:
        model: A folder or a name on the Hub.
        out: The new folder; must not exist, or be empty.
        positive_zeros: Turn negative zeros into zeros first. They result from
            multiplying weights by a mask; otherwise they are stored like any other
            weight, bit for bit, and take as many bytes.
        trust_remote_code: Allow Python code that comes with the model to run.
        progress: Called before each file.

    Returns:
        How each matrix is stored, which `OUT/halve.json` contains too.

    Raises:
        HalveError: Packing would shrink nothing, or any other error that you can fix.

    Cost:
        Reads and writes every tensor once; memory for the largest block, twice.

    Source:
        docs/format.md.
    """
    show = progress or (lambda _: None)
    rewriting = PackOptions(positive_zeros, trust_remote_code, show)
    return pack_model(model, out, rewriting)


def unpack(
    model: str | Path,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PackRecord:
    """Store a packed model dense, for programs that do not support Halve's format.

    `unpack(pack(m)) == m`, bit for bit. A model in FP8, MXFP4 or a format of
    compressed-tensors that Halve reads becomes bfloat16. Arguments, errors and cost as
    for `pack`.
    """
    show = progress or (lambda _: None)
    rewriting = PackOptions(False, trust_remote_code, show)
    return unpack_model(model, out, rewriting)
