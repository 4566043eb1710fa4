"""`halve eval`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from halve.records import ComparisonRecord, PerplexityRecord

EXAMPLES = """
**Examples**

`halve eval ./opt-125m-half --data wikitext2`

`halve eval ./opt-125m-half --data wikitext2 --against facebook/opt-125m`

`halve eval ./llama-24 --data text.txt --seq-len 1024 --segments 100 --json`
"""


def command(  # noqa: PLR0913, PLR0917  (one parameter for each option)
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="wikitext2, ptb, c4, stdlib, a data set of the hub, or a .txt, "
            ".jsonl or .parquet file."
        ),
    ] = "wikitext2",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Another model: also print how far the predictions are from its own.",
            show_default=False,
        ),
    ] = None,
    seq_len: options.SeqLen = None,
    segments: Annotated[
        int | None,
        typer.Option(help="At most so many segments; all by default.", min=1),
    ] = None,
    device: options.Device = "auto",
    activation_memory: options.ActivationMemory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Judge a model by its perplexity, block by block, even if larger than memory."""
    import json

    from halve.cli.console import progress_line
    from halve.evaluation import compare, evaluate
    from halve.options import EvalOptions

    with progress_line(quiet) as show:
        options = EvalOptions(
            data=data,
            seq_len=seq_len,
            segments=segments,
            device=device,
            activation_memory=activation_memory,
            trust_remote_code=trust_remote_code,
            progress=lambda block, blocks: show(f"block {block + 1} of {blocks}"),
        )
        record = (
            compare(model, against, options) if against else evaluate(model, options)
        )
    if as_json:
        print(json.dumps(asdict(record), indent=2))
    elif against:
        _print_comparison(record, model, against)  # pyright: ignore[reportArgumentType]
    else:
        _print_perplexity(record, model)  # pyright: ignore[reportArgumentType]


def _print_perplexity(record: "PerplexityRecord", model: str) -> None:
    print(f"{model}: perplexity {_with_error(record)}")
    _print_basis(record)


def _with_error(record: "PerplexityRecord") -> str:
    return f"{record.perplexity:.4f} +/- {record.standard_error:.4f}"


def _print_basis(record: "PerplexityRecord") -> None:
    from halve.cli.console import duration

    print(
        f"{record.data}: {record.tokens} tokens predicted, {record.segments} segments "
        f"of {record.seq_len}, {duration(record.seconds)}"
    )


def _print_comparison(record: "ComparisonRecord", model: str, against: str) -> None:
    print(f"{against}: perplexity {_with_error(record.reference)}")
    print(f"{model}: perplexity {_with_error(record.model)}")
    print(
        f"KL divergence: mean {record.kl_mean:.6f}, median {record.kl_median:.6f}, "
        f"99th percentile {record.kl_99:.6f}"
    )
    print(f"Same first choice: {100 * record.agreement:.2f}% of tokens")
    _print_basis(record.model)
