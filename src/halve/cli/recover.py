"""`halve recover`."""

from typing import TYPE_CHECKING, Annotated

from halve.cli.options import Json, Model, Out, Quiet, check_found, with_options
from halve.option import TRAINING, Option
from halve.options import RecoverOptions

if TYPE_CHECKING:
    from halve.cli.progress import Step
    from halve.records import Progress, RecoverRecord

EXAMPLES = """
**Examples**

`halve recover ./opt-half --against facebook/opt-125m -o ./opt-better --calibration c4`

`halve recover ./llama-24 --against ./llama -o ./llama-better --minutes 60`
"""


@with_options(panels=True)
def command(
    model: Model,
    out: Out,
    options: RecoverOptions,
    against: Annotated[
        str,
        Option(
            "The dense model, whose predictions are learned.",
            TRAINING,
            metavar="DENSE",
        ),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the kept weights of a pruned model to predict as the dense model does.

    Zeros stay zero. The state that is best on held-out windows is stored; it is never
    worse than the input. After an interruption, rerun the same command to resume.
    """
    check_found(against)
    from dataclasses import replace

    from transformers.utils.logging import disable_progress_bar

    from halve.api import recover
    from halve.cli.console import print_next
    from halve.cli.progress import progress_bar

    disable_progress_bar()  # of a model that is loaded whole, to sample text from it
    with progress_bar(quiet) as show:
        shown = replace(options, progress=lambda p: show(_step(p)))
        record = recover(model, against, out, options=shown)
    if as_json:
        print(record.to_json(), end="")
        return
    _print_record(record)
    print_next(("eval", out, "--against", against), ("verify", out))


def _step(progress: "Progress") -> "Step":
    from halve.cli.progress import Step

    text = f"step {progress.block + 1} of {progress.blocks}: {progress.phase}"
    fraction = progress.block / progress.blocks
    return Step(text, fraction, progress.seconds_left)


def _print_record(record: "RecoverRecord") -> None:
    from halve.cli.console import duration, local_time, percent, print_table, size

    rows = [(str(state.step), f"{state.divergence:.6f}") for state in record.states]
    print_table("", ["step", "held-out divergence"], rows)
    recovered = 1 - record.after / record.before if record.before else 0.0
    print(
        f"Step {record.best_step} of {record.steps} is stored: held-out divergence "
        f"{record.before:.6f} before, {record.after:.6f} after ({percent(recovered)} "
        "less)."
    )
    if record.unchanged:
        print(f"{len(record.unchanged)} quantized matrices keep their values.")
    print(f"{record.trained:,} parameters trained.")
    if record.bytes_peak:
        print(f"Peak memory: {size(record.bytes_peak)}.")
    print(
        f"Finished at {local_time(record.finished)}, after {duration(record.seconds)}."
    )
