"""Look at a model's files: what is in them, and whether they are undamaged."""

from pathlib import Path

from halve.measure import inspect_model, verify_output
from halve.records import Inspection, Verification


def inspect(model: str | Path, *, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model's files: sparsity and pattern of every prunable matrix.

    Args:
        model: A folder or a name on the Hub.
        trust_remote_code: Allow Python code that comes with the model to run.

    Returns:
        For each matrix its shape, dtype, fraction of zeros, tightest pattern, bytes,
        and whether it is packed; for the whole model its parameters, zeros and bytes.

    Raises:
        HalveError: Any error that you can fix; the message says what is wrong and what
            to do.

    Cost:
        Reads every tensor once; memory for one tensor at a time.
    """
    return inspect_model(model, trust_remote_code)


def verify(out: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Check a folder that Halve wrote against its record, `halve.json`.

    Every file is compared with its SHA-256 in `halve.json`, and that file with its own
    checksum, so a flipped bit or a missing byte in any of them is detected. If all
    match, every matrix is checked: its zeros, its n:m pattern, and whether its values
    lie on the grid to which it was quantized. Files that were added and that nothing
    loads are ignored. This detects damage, not forgery: there is no signature.

    Args:
        out: A folder that `prune`, `pack` or `unpack` wrote, or a name on the Hub.
        trust_remote_code: Allow Python code that comes with the model to run.

    Returns:
        What was checked, and a finding for each file or matrix that differs; `sound` if
        there is none.

    Raises:
        CheckpointError: `halve.json` is missing, or itself damaged, so that nothing can
            be checked.
        HalveError: Any other error that you can fix.

    Cost:
        Reads every file twice; memory for one tensor at a time.
    """
    return verify_output(out, trust_remote_code)
