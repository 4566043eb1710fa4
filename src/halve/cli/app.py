"""`halve`: its subcommands, and how all of them report errors."""

import io
import os
import re
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperCommand

from halve.cli import (
    bench,
    chat,
    demo,
    evaluate,
    generate,
    inspect,
    pack,
    prune,
    recover,
    report,
    serve,
    verify,
)


class _Command(TyperCommand):
    """A subcommand whose usage line shows its arguments without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        """Return `MODEL` for typer's `{MODEL}`, and `[MODEL]` for its `[[MODEL]]`."""
        pieces = super().collect_usage_pieces(ctx)
        return [
            re.sub(r"^\[\[(.*)\]\]$|^\{(.*)\}$", _without_braces, piece)
            for piece in pieces
        ]


def _without_braces(match: re.Match[str]) -> str:
    return f"[{match[1]}]" if match[1] else match[2]


app = typer.Typer(
    name="halve",
    help="Prune large language models in one shot, and measure what was lost.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("prune", cls=_Command, epilog=prune.EXAMPLES)(prune.command)
app.command("recover", cls=_Command, epilog=recover.EXAMPLES)(recover.command)
app.command("eval", cls=_Command, epilog=evaluate.EXAMPLES)(evaluate.command)
app.command("pack", cls=_Command, epilog=pack.PACK_EXAMPLES)(pack.pack)
app.command("unpack", cls=_Command, epilog=pack.UNPACK_EXAMPLES)(pack.unpack)
app.command("inspect", cls=_Command, epilog=inspect.EXAMPLES)(inspect.command)
app.command("verify", cls=_Command, epilog=verify.EXAMPLES)(verify.command)
app.command("generate", cls=_Command, epilog=generate.EXAMPLES)(generate.command)
app.command("chat", cls=_Command, epilog=chat.EXAMPLES)(chat.command)
app.command("serve", cls=_Command, epilog=serve.EXAMPLES)(serve.command)
app.command("bench", cls=_Command, epilog=bench.EXAMPLES)(bench.command)
app.command("report", cls=_Command, epilog=report.EXAMPLES)(report.command)
app.command("demo", cls=_Command, epilog=demo.EXAMPLES)(demo.command)


@app.callback(invoke_without_command=True)
def _halve(
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    if version:
        from halve import __version__

        print(__version__)
        raise typer.Exit


def _printable(message: str) -> str:
    """Return one line without control characters, which untrusted names may contain."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _print_warning(message: Warning | str, *_: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)


def _accept_any_text() -> None:
    """Let what an output's encoding lacks be replaced, rather than raise at the end."""
    for stream in (sys.stdout, sys.stderr):
        # None where it is closed; tests put another object in its place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Run the command line.

    Exits with 0 when done, 1 on a HalveError, 2 on bad usage, 130 and 143 on SIGINT and
    SIGTERM.
    """
    from halve.cli.interruption import Interrupted, interruptible, resume_hint

    _accept_any_text()
    # Halve reports what goes wrong while loading; the libraries' messages repeat it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        # Report errors inside this context: when a rank ends, torchrun sends SIGTERM to
        # the others, and one that fails as well must print why before it is killed.
        with interruptible():
            _run()
    except Interrupted as interrupted:
        print(resume_hint(interrupted), file=sys.stderr)
        sys.exit(interrupted.exit_code)


def _run() -> None:
    """Run a subcommand and report its error, if any."""
    from halve.errors import HalveError, HalveWarning, ReportedError

    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                warnings.simplefilter("default", HalveWarning)
                warnings.showwarning = _print_warning
            app()
    except ReportedError:
        sys.exit(1)
    except HalveError as error:
        print(f"Error: {_printable(str(error))}", file=sys.stderr)
        sys.exit(1)
