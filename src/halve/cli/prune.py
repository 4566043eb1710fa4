"""`halve prune`."""

from typing import TYPE_CHECKING, Annotated

from halve.cli.options import Json, Model, Out, Quiet, with_options
from halve.option import OUTPUT, Option
from halve.options import PruneOptions, RunOptions

if TYPE_CHECKING:
    from halve.layout import PlannedBlock
    from halve.pruning import DryRun, Forecast
    from halve.pruning.memory.gpu import GpuForecast
    from halve.pruning.plan import Plan
    from halve.records import Progress, PruneRecord

EXAMPLES = """
**Examples**

`halve prune facebook/opt-125m -o opt-125m-half --calibration wikitext2`

`halve prune ./llama -o ./llama-24 --sparsity 2:4 --calibration text.jsonl`

`halve prune ./llama -o ./llama-best --refine --calibration wikitext2`

`halve prune ./llama -o ./llama-small --pack --calibration wikitext2`

`halve prune ./llama -o ./llama-int4 --quantize int4 --calibration wikitext2`

`halve prune ./llama -o ./llama-70 --sparsity 70% --calibration stdlib --dry-run`

`torchrun --nproc-per-node 2 -m halve prune ./llama -o ./llama-half`
"""


@with_options(panels=True)
def command(  # noqa: PLR0913, PLR0917  (typer calls it by keyword)
    model: Model,
    out: Out,
    options: PruneOptions,
    run_options: RunOptions,
    dry_run: Annotated[
        bool, Option("Print the plan and its forecast; write nothing.", OUTPUT)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model into a new folder that loads wherever the model does.

    The model is processed block by block, so it may be larger than memory. After an
    interruption, rerun the same command to resume. Processes started by torchrun divide
    the work among themselves.
    """
    if dry_run:
        from halve.api import plan

        _print_dry_run(plan(model, options=options, run_options=run_options), as_json)
        return
    record = _prune((model, out, options), run_options, quiet)
    if record is None:
        return
    if as_json:
        print(record.to_json(), end="")
    else:
        _print_record(record, out)


def _prune(
    job: tuple[str, str, PruneOptions], run_options: RunOptions, quiet: bool
) -> "PruneRecord | None":
    """Prune, with the other processes of torchrun if any; only rank 0 gets a record."""
    from dataclasses import replace

    from halve.cli.console import progress_line
    from halve.distributed import join
    from halve.pruning import prune_model

    with join() as ranks, progress_line(quiet or not ranks.is_main_process) as show:
        shown = replace(run_options, progress=lambda p: show(_describe(p)))
        record = prune_model(*job, shown, ranks)
    return record if ranks.is_main_process else None


def _describe(progress: "Progress") -> str:
    from halve.cli.console import duration

    left = progress.seconds_left
    tail = "" if left is None else f", {duration(left)} left"
    return f"block {progress.block + 1} of {progress.blocks}: {progress.phase}{tail}"


def _print_record(record: "PruneRecord", out: str) -> None:
    from halve.cli.console import duration, percent, print_table

    rows = [
        (b.name, percent(b.sparsity), percent(b.error), duration(b.seconds))
        for b in record.blocks
    ]
    print_table("", ["block", "sparsity", "output error", "time"], rows)
    print(f"{percent(record.sparsity)} of the prunable weights are zero in {out}.")
    if record.bits is not None:
        print(f"Packed with their grids they would take {record.bits:.2f} bits each.")
    if record.allocation is not None:
        trials = ", ".join(
            f"{t.strength:.3g}: {t.divergence:.4g}" for t in record.allocation.trials
        )
        print(f"Divergence on held-out windows by strength of allocation: {trials}.")
    if record.left_dense:
        print(f"Left dense in the blocks: {', '.join(record.left_dense)}.")
    print(f"Finished {record.finished}, after {duration(record.seconds)}.")


def _print_dry_run(dry_run: "DryRun", as_json: bool) -> None:
    import json

    from halve.cli.console import duration, size

    if as_json:
        print(json.dumps(dry_run.to_dict(), indent=2))
        return
    plan, forecast = dry_run.plan, dry_run.forecast
    _print_matrices(plan)
    _print_targets(plan)
    _print_forecast(forecast)
    if dry_run.gpu is not None:
        _print_gpu(dry_run.gpu)
    print(f"Output: {size(forecast.output)} in {len(plan.layout.shards)} files")
    print(f"Time, very roughly: {duration(dry_run.seconds)}")


def _print_matrices(plan: "Plan") -> None:
    """Print the matrices of one block of each kind, and what stays dense in all."""
    layout = plan.layout
    if not layout.has_weights:
        print(f"{plan.model} holds no weights; the plan is made from its config.json.")
    matrices = sum(len(block.matrices) for block in layout.blocks)
    print(f"{len(layout.blocks)} blocks with {matrices} matrices to prune:")
    shown: set[tuple[object, ...]] = set()
    for block in layout.blocks:
        kind = tuple((m.matrix.path, m.matrix.shape) for m in block.matrices)
        if kind not in shown:
            print("\n".join(_matrix_lines(block)))
        shown.add(kind)
    if len(layout.blocks) > len(shown):
        print("  ... and the same in every other block")
    for name in layout.left_dense:
        print(f"  {name}  left dense")


def _matrix_lines(block: "PlannedBlock") -> list[str]:
    """Return a line for each matrix of a block, and for that of all its experts."""
    lines: list[str] = []
    for planned in block.matrices:
        if planned.matrix.expert:
            continue
        rows, columns = planned.matrix.shape
        times = ""
        if planned.matrix.experts is not None:
            times = f", experts x {len(block.experts[planned.matrix.experts])}"
        name = planned.experts_name or planned.name
        lines.append(f"  {name}{times}  {rows} x {columns}")
    return lines


def _print_targets(plan: "Plan") -> None:
    targets = ", or ".join(
        f"{pattern} to prune" + (f" and {grid} for the rest" if grid else "")
        for pattern, grid in plan.options.pairs
    )
    print(f"{plan.layout.prunable:,} prunable weights, {targets}.")
    if plan.options.allocation_held_out:
        print("Distributed over the blocks by error, after two to four trials.")


def _print_gpu(gpu: "GpuForecast") -> None:
    from halve.cli.console import size

    where = "on the GPU" if gpu.keeps_hidden else "in the host's memory"
    text = (
        f"GPU memory ({gpu.name}), while {gpu.largest.name}: {size(gpu.peak)} of "
        f"{size(gpu.total)}"
    )
    if gpu.hidden:
        text += f"; hidden states ({size(gpu.hidden)}) stay {where}"
    print(text if gpu.fits else f"{text}; batches will be smaller, or it will fail")


def _print_forecast(forecast: "Forecast") -> None:
    from halve.cli.console import print_table, size

    rows = [("process", "", size(forecast.process))]
    if forecast.resident:
        rows.append(("hidden states and cached inputs", "", size(forecast.resident)))
    for name, parts in forecast.by_name().items():
        rows += [(name, part, size(count)) for part, count in parts.items() if count]
    print_table("", ["memory", "part", "bytes"], rows)
    print(f"Peak memory, while {forecast.largest.name}: {size(forecast.peak)}")
    if forecast.mapped:
        mapped = size(forecast.mapped)
        print(f"Hidden states and cached inputs in memory-mapped files: {mapped}")
    print(f"Disk: {size(forecast.disk)}")
