"""`halve report`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.options import Json, Quiet, check_model, with_options
from halve.options import ReportOptions

if TYPE_CHECKING:
    from halve.reporting import Facts

EXAMPLES = """
**Examples**

`halve report ./opt-125m-half`

`halve report ./opt-125m-half --measure --data wikitext2`

`halve report ./llama-24 --measure --against ./llama --data text.txt --no-speed`

`halve report ./opt-125m-half --card`
"""

# The file that stands for standard output.
_STDOUT = "-"


@with_options(panels=True)
def command(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A folder that Halve wrote.", callback=check_model
        ),
    ],
    options: ReportOptions,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one page of what is known about an output: losses, size, speed, origin.

    The page is a single HTML file without scripts. What was not measured is left out;
    --measure measures it. --json prints the facts, and writes no page.
    """
    from halve.records.codec import to_json
    from halve.reporting import gather_facts, output_folder, render, write_report

    folder = output_folder(out)
    if options.measures:
        _measure(out, options, quiet)
    facts = gather_facts(folder, options.against)
    if as_json:
        print(to_json(facts.to_dict()))
    elif options.file == _STDOUT:
        print(render(facts), end="")
    else:
        page = write_report(folder, facts, options.file, options.card)
        _print_written(facts, str(page))


def _measure(out: str, options: ReportOptions, quiet: bool) -> None:
    from transformers.utils.logging import disable_progress_bar

    from halve.api import measure_output
    from halve.cli.progress import Step, progress_bar

    disable_progress_bar()
    with progress_bar(quiet) as show:
        shown = replace(options, progress=lambda text: show(Step(text)))
        measure_output(out, shown)


def _print_written(facts: "Facts", page: str) -> None:
    from halve.reporting.summary import verdict

    print(f"{verdict(facts)}\nThe page is {page}.")
