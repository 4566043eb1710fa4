"""`halve`: its subcommands, and what every one of them does with an error."""

import os
import sys
import warnings

import typer

from halve.cli import (
    bench,
    demo,
    evaluate,
    generate,
    inspect,
    pack,
    prune,
    serve,
    verify,
)

app = typer.Typer(
    name="halve",
    help="Prune large language models in one shot, and prove what was lost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("prune", epilog=prune.EXAMPLES)(prune.command)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.command)
app.command("pack", epilog=pack.PACK_EXAMPLES)(pack.pack)
app.command("unpack", epilog=pack.UNPACK_EXAMPLES)(pack.unpack)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.command)
app.command("verify", epilog=verify.EXAMPLES)(verify.command)
app.command("generate", epilog=generate.EXAMPLES)(generate.command)
app.command("serve", epilog=serve.EXAMPLES)(serve.command)
app.command("bench", epilog=bench.EXAMPLES)(bench.command)
app.command("demo", epilog=demo.EXAMPLES)(demo.command)


@app.callback(invoke_without_command=True)
def _halve(
    version: bool = typer.Option(False, "--version", help="Print the version."),
) -> None:
    if version:
        from halve import __version__

        print(__version__)
        raise typer.Exit


def _printable(message: str) -> str:
    """Return one line that no name in a hostile file can turn into orders."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _print_warning(message: Warning | str, *_: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line.

    Exits with 0 when done, 1 on a HalveError, 2 on bad usage, 130 and 143 on SIGINT and
    SIGTERM.
    """
    from halve.cli.interruption import Interrupted, how_to_go_on, interruptible

    # What the libraries have to say while loading is Halve's to say or not.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        # Errors are told within: torchrun stops a process whose fellow has ended, and
        # one that fails as well is deaf to that until it has said why.
        with interruptible():
            _run()
    except Interrupted as interrupted:
        print(how_to_go_on(interrupted), file=sys.stderr)
        sys.exit(interrupted.exit_code)


def _run() -> None:
    """Run a subcommand; say what went wrong."""
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
