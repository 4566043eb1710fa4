"""`halve verify`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from halve.records import Verification

EXAMPLES = """
**Examples**

`halve verify ./opt-125m-half`

`halve verify ./opt-125m-packed --json`
"""


def command(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder that Halve has made.")
    ],
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Check every file against its SHA-256, and every matrix against its promise."""
    import json

    from halve.measure import verify_output

    found = verify_output(out, trust_remote_code)
    if as_json:
        print(json.dumps(asdict(found) | {"sound": found.sound}, indent=2))
    else:
        _print(found)
    if not found.sound:
        _refuse(found)


def _print(found: "Verification") -> None:
    from halve.cli.console import print_table, size

    if found.findings:
        rows = [(finding.name, finding.problem) for finding in found.findings]
        print_table("", ["file or matrix", "found"], rows)
        return
    print(
        f"{found.files} files, {size(found.bytes)}: as they were written.\n"
        f"{found.matrices} matrices: sparsity, pattern and grid as promised."
    )


def _refuse(found: "Verification") -> None:
    from halve.errors import CheckpointError

    first, count = found.findings[0], len(found.findings)
    others = f", and {count - 1} more are amiss" if count > 1 else ""
    raise CheckpointError(
        f"{first.name} in {found.folder} is not as it should be: {first.problem}"
        f"{others}.",
        "Make the model again, or copy the file from where it is whole.",
    )
