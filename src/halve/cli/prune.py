"""`halve prune`."""

from typing import TYPE_CHECKING, Annotated

from halve.cli.evaluate import compare_showing, print_comparison
from halve.cli.options import Json, Model, Out, Quiet, with_options
from halve.option import OUTPUT, Option
from halve.options import EvalOptions, PruneOptions, RunOptions

if TYPE_CHECKING:
    from halve.records import ComparisonRecord, PruneRecord

# Sparsities that differ by less are alike: they are rounded to whole weights.
_ALIKE = 0.01

EXAMPLES = """
**Examples**

`halve prune facebook/opt-125m -o opt-125m-half --calibration wikitext2`

`halve prune ./llama -o ./llama-24 --sparsity 2:4 --calibration text.jsonl`

`halve prune ./llama -o ./llama-half --calibration c4 --evaluate wikitext2`

`halve prune ./llama -o ./llama-best --refine --calibration wikitext2`

`halve prune ./llama -o ./llama-small --pack --calibration wikitext2`

`halve prune ./llama -o ./llama-int4 --quantize int4 --calibration wikitext2`

`halve prune ./llama -o ./llama-70 --sparsity 70% --calibration stdlib --dry-run`

`halve prune ./llama -o ./llama-mixed --rule 'down_proj=40%' --skip 'layers\\.0\\.'`

`halve prune ./mixtral -o ./mixtral-6 --experts 75% --sparsity 0`

`halve prune ./llama -o ./llama-best --preset best --config run.yaml`

`torchrun --nproc-per-node 2 -m halve prune ./llama -o ./llama-half`
"""


@with_options(panels=True, presets=True)
def command(  # noqa: PLR0913, PLR0917  (typer calls it by keyword)
    model: Model,
    out: Out,
    options: PruneOptions,
    run_options: RunOptions,
    dry_run: Annotated[
        bool, Option("Print the plan and its forecast; write nothing.", OUTPUT)
    ] = False,
    verbose: Annotated[
        bool,
        Option("With --dry-run: list matrices and the memory of each phase.", OUTPUT),
    ] = False,
    evaluate: Annotated[
        str | None,
        Option(
            "Then compare the output with MODEL on this text, as `halve eval --against "
            "MODEL --keep` does.",
            OUTPUT,
            metavar="TEXT",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model into a new folder that loads wherever the model does.

    The model is processed block by block, so it may be larger than memory. After an
    interruption, rerun the same command to resume. Processes started by torchrun divide
    the work among themselves.
    """
    eval_options = _eval_options(evaluate, options, run_options)
    if dry_run:
        _plan(model, (options, run_options), as_json, verbose)
        return
    if eval_options is not None:
        _check_text(model, eval_options)
    from halve.cli.console import print_next

    record = _prune((model, out, options), run_options, quiet)
    if record is None:
        return
    if not as_json:
        _print_record(record, out)
    measured = None
    if eval_options is not None:
        measured = _compare(out, model, eval_options, quiet)
    if as_json:
        print(_as_json(record, measured), end="")
        return
    if measured is not None:
        print_comparison(measured, out, model)
    print_next(
        *([("eval", out, "--against", model)] if measured is None else []),
        ("pack", out, "-o", f"{out.rstrip('/')}-packed"),
        ("report", out),
    )


def _eval_options(
    data: str | None, options: PruneOptions, run_options: RunOptions
) -> EvalOptions | None:
    """Return how the output is compared with the model, if it is; check the text."""
    if data is None:
        return None
    eval_options = EvalOptions(
        data=data,
        device=options.device,
        activation_memory=run_options.activation_memory,
        trust_remote_code=run_options.trust_remote_code,
    )
    eval_options.check()
    return eval_options


def _check_text(model: str, options: EvalOptions) -> None:
    """Raise before hours of pruning what the comparison would raise after them."""
    from halve.evaluation import check_text

    check_text(model, options)


def _compare(
    out: str, model: str, options: EvalOptions, quiet: bool
) -> "ComparisonRecord":
    """Compare an output with the dense model, and keep the figures with it."""
    from halve.measure import check_keepable, keep_measurement

    folder = check_keepable(out)
    measured = compare_showing(out, model, options, quiet)
    keep_measurement(folder, measured, model)
    return measured


def _as_json(record: "PruneRecord", measured: "ComparisonRecord | None") -> str:
    """Return the record, with the comparison as `evaluation` if there was one."""
    if measured is None:
        return record.to_json()
    import json
    from dataclasses import asdict

    from halve.records.codec import to_json

    return (
        to_json({**json.loads(record.to_json()), "evaluation": asdict(measured)}) + "\n"
    )


def _plan(
    model: str, options: tuple[PruneOptions, RunOptions], as_json: bool, verbose: bool
) -> None:
    """Print what a run would do and take."""
    import json

    from halve.api import plan
    from halve.cli.dry_run import print_dry_run

    planned = plan(model, options=options[0], run_options=options[1])
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        print_dry_run(planned, verbose)


def _prune(
    job: tuple[str, str, PruneOptions], run_options: RunOptions, quiet: bool
) -> "PruneRecord | None":
    """Prune, with the other processes of torchrun if any; only rank 0 gets a record."""
    from dataclasses import replace

    from transformers.utils.logging import disable_progress_bar

    from halve.cli.progress import progress_bar, step_of_block
    from halve.distributed import join
    from halve.pruning import prune_model

    disable_progress_bar()  # of a model that is loaded whole, to sample text from it
    with join() as ranks, progress_bar(quiet or not ranks.is_main_process) as show:
        shown = replace(run_options, progress=lambda p: show(step_of_block(p)))
        record = prune_model(*job, shown, ranks)
    return record if ranks.is_main_process else None


def _print_record(record: "PruneRecord", out: str) -> None:
    from halve.cli.console import duration, local_time, percent, print_table, size

    rows = [
        (
            b.name,
            percent(b.sparsity),
            percent(b.error),
            percent(b.token_error),
            duration(b.seconds),
        )
        for b in record.blocks
    ]
    columns = ["block", "sparsity", "output error", "mean by token", "time"]
    print_table("", columns, rows)
    print(f"{percent(record.sparsity)} of the prunable weights are zero in {out}.")
    _print_spread(record)
    _print_experts(record)
    _print_windows(record)
    if record.bits is not None:
        print(f"As packed codes they take {record.bits:.2f} bits each.")
    if record.allocation is not None:
        trials = ", ".join(
            f"{t.strength:.3g}: {t.divergence:.4g}" for t in record.allocation.trials
        )
        print(f"Divergence on held-out windows by strength of allocation: {trials}.")
    if record.mix is not None:
        trials = "; ".join(
            f"{t.name}, {t.bits:.3g} bits: {t.divergence:.4g}"
            for t in record.mix.trials
        )
        print(f"Divergence on held-out windows by mix: {trials}.")
    if record.left_dense:
        print(f"Left dense in the blocks: {', '.join(record.left_dense)}.")
    if record.bytes_peak:
        peak, foreseen = size(record.bytes_peak), size(record.bytes_foreseen)
        print(f"Peak memory: {peak} ({foreseen} predicted).")
    print(
        f"Finished at {local_time(record.finished)}, after {duration(record.seconds)}."
    )


def _print_spread(record: "PruneRecord") -> None:
    """Print by how much the sparsities of matrices differ, if they do."""
    from halve.cli.console import percent

    low, high = record.sparsity_range
    if high - low > _ALIKE:
        print(f"Sparsity of single matrices: {percent(low)} to {percent(high)}.")


def _print_experts(record: "PruneRecord") -> None:
    """Print how many experts were kept, and by which score."""
    from collections import Counter

    if (experts := record.experts) is None:
        return
    counts = Counter(module.saliency for module in experts.modules)
    scores = ", ".join(f"{name} in {count}" for name, count in counts.items())
    print(
        f"Each block kept {experts.kept} of {experts.total} experts; blocks by score: "
        f"{scores}."
    )


def _print_windows(record: "PruneRecord") -> None:
    """Print which text the run was calibrated on, if it was."""
    used = record.identity
    if used["calibration_sha256"] is None:
        return
    bos = "" if used["bos_id"] is None else ", each after BOS"
    own = used["self_samples"]
    sampled = f", {own} of them sampled from the model" if own else ""
    print(
        f"Calibrated on {used['samples']} windows of {used['seq_len']} tokens of "
        f"{used['calibration']}{bos}{sampled}."
    )
