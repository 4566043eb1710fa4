"""`halve verify`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.options import Json, check_found, check_model, with_options
from halve.options import TrustRemoteCode

if TYPE_CHECKING:
    from halve.errors import CheckpointError
    from halve.records import Verification

EXAMPLES = """
**Examples**

`halve verify ./opt-125m-half`

`halve verify ./opt-125m-packed --json`
"""


@with_options()
def command(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A folder that Halve wrote.", callback=check_model
        ),
    ],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Check every file against its SHA-256, and every matrix against its record."""
    check_found(out)
    from halve.measure import verify_output
    from halve.records.codec import to_json

    verification = verify_output(out, trust_remote_code)
    if as_json:
        print(to_json(asdict(verification) | {"sound": verification.sound}))
    else:
        _print(verification)
    if not verification.sound:
        raise _damaged(verification)


def _print(verification: "Verification") -> None:
    from halve.cli.console import print_table, size

    if verification.findings:
        rows = [(finding.name, finding.problem) for finding in verification.findings]
        print_table("", ["file or matrix", "problem"], rows)
        return
    print(
        f"{verification.files} files, {size(verification.bytes)}: as they were "
        f"written.\n{verification.matrices} matrices: sparsity, pattern and grid as "
        "recorded."
    )


def _damaged(verification: "Verification") -> "CheckpointError":
    from halve.errors import CheckpointError

    first, count = verification.findings[0], len(verification.findings)
    others = f", and {count - 1} more differ" if count > 1 else ""
    return CheckpointError(
        f"{first.name} in {verification.folder} differs from its record: "
        f"{first.problem}{others}.",
        "Create the folder again, or copy the file from an intact copy.",
    )
