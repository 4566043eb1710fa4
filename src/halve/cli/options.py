"""Options that several subcommands share."""

import re
from typing import Annotated

import typer

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """Read a number of bytes: `8GiB`, `500MB` (binary as well) or `1000000`."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    try:
        if match:
            return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not a size; write it as 8GiB or 500MiB")


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a name on the hub.")
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a sequence; the model's longest, 2048 at most, by default.",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
]
ActivationMemory = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="Hidden states past this size (8GiB, say) go to a mapped file; a quarter "
        "of the memory by default.",
        show_default=False,
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="What the whole process may take (20GiB, say); decides where hidden "
        "states live and when sums are taken.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
