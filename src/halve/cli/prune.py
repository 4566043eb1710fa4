"""`halve prune`."""

from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import options

if TYPE_CHECKING:
    from halve.options import PruneOptions, RunOptions
    from halve.plan import Plan
    from halve.pruning import Forecast
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


def command(  # noqa: PLR0913, PLR0917  (one parameter for each option)
    model: options.Model,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="OUT", help="The new folder.")
    ],
    sparsity: Annotated[
        str, typer.Option(help="50%, 0.5, or n:m such as 2:4: n kept of every m.")
    ] = "50%",
    solver: Annotated[
        str,
        typer.Option(
            help="auto (the best on held-out windows), admm, sparsegpt, wanda or "
            "magnitude."
        ),
    ] = "auto",
    calibration: Annotated[
        str,
        typer.Option(
            help="c4, wikitext2, ptb, a data set of the hub, a .txt, .jsonl or "
            ".parquet file, stdlib (this Python's sources), or self (the model's "
            "own text)."
        ),
    ] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: options.SeqLen = None,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    damping: Annotated[
        float, typer.Option(help="Share of the mean diagonal added to Gram matrices.")
    ] = 0.01,
    block_size: Annotated[
        int, typer.Option(help="Columns that sparsegpt handles at once.")
    ] = 128,
    device: options.Device = "auto",
    activation_memory: options.ActivationMemory = None,
    memory: options.Memory = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Tune the kept weights once the mask is chosen; admm does."
        ),
    ] = False,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--no-sequential",
            help="Prune the matrices of a block in order, each for what those "
            "before it give when pruned; on for auto and admm.",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine", help="Tune each block to the dense one's outputs; no labels."
        ),
    ] = False,
    epochs: Annotated[
        int, typer.Option(help="Passes over the windows for --refine.")
    ] = 3,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, int4, int3 or int2: round the kept weights to so many bits.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 128,
    symmetric: Annotated[
        bool,
        typer.Option("--symmetric/--asymmetric", help="Scales alone, or zero points."),
    ] = True,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, all told; chooses sparsity and bits by itself.",
            show_default=False,
        ),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            help="uniform, or error: blocks that suffer more are pruned less, if that "
            "helps on held-out windows; the whole model has the sparsity exactly."
        ),
    ] = "uniform",
    packed: Annotated[
        bool,
        typer.Option("--pack", help="Store it packed, as `halve pack` does."),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; do nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a model into a new folder that loads wherever the model does.

    It goes block by block, so the model may be larger than memory. Interrupted, the
    same command goes on where it stopped. Processes that torchrun starts share the
    work.
    """
    from halve.checkpoint import resolve_model
    from halve.options import PruneOptions, RunOptions
    from halve.plan import make_plan
    from halve.pruning import estimate_seconds, forecast_run, plan_memory
    from halve.runtime.blockwise_model import choose_device

    settings = PruneOptions(
        sparsity=sparsity,
        solver=solver,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        damping=damping,
        block_size=block_size,
        device=device,
        packed=packed,
        refit=refit,
        sequential=sequential,
        refine=refine,
        epochs=epochs,
        quantize=quantize,
        group_size=group_size,
        symmetric=symmetric,
        target_bits=target_bits,
        allocation=allocation,
    )
    if dry_run:
        folder = resolve_model(model, weights=False)
        plan = make_plan(folder, settings, trust_remote_code, needs_weights=False)
        room = plan_memory(plan, memory, activation_memory)
        found = forecast_run(plan, room.activations, room.deferred)
        time = estimate_seconds(found, choose_device(settings.device))
        _print_plan(plan, found, time, as_json)
        return
    run_options = RunOptions(activation_memory, memory, trust_remote_code)
    record = _prune((model, out, settings), run_options, quiet)
    if record is None:
        return
    if as_json:
        print(record.to_json(), end="")
    else:
        _print_record(record, out)


def _prune(
    job: "tuple[str, str, PruneOptions]", run_options: "RunOptions", quiet: bool
) -> "PruneRecord | None":
    """Prune, with other processes if torchrun started some; of those one has a say."""
    from dataclasses import replace

    from halve.cli.console import progress_line
    from halve.distributed import join
    from halve.pruning import prune_model

    with join() as ranks, progress_line(quiet or not ranks.is_main_process) as show:
        own = replace(run_options, progress=lambda p: show(_describe(p)))
        record = prune_model(*job, own, ranks)
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
        tried = ", ".join(
            f"{t.strength:.3g}: {t.divergence:.4g}" for t in record.allocation.trials
        )
        print(f"Divergence on held-out windows by strength of allocation: {tried}.")
    if record.left_dense:
        print(f"Left dense in the blocks: {', '.join(record.left_dense)}.")
    print(f"Finished {record.finished}, after {duration(record.seconds)}.")


def _print_plan(plan: "Plan", costs: "Forecast", seconds: float, as_json: bool) -> None:
    import json

    from halve.cli.console import duration, size

    figures = {
        "blocks": len(plan.layout.blocks),
        "matrices": sum(len(block.matrices) for block in plan.layout.blocks),
        "prunable_weights": plan.layout.prunable,
        "sequence_length": plan.options.seq_len,
        "bytes_peak": costs.peak,
        "bytes_process": costs.process,
        "bytes_activations_in_memory": costs.resident,
        "bytes_activations_mapped": costs.mapped,
        "largest_phase": costs.largest.name,
        "bytes_by_phase": costs.by_name(),
        "bytes_output": costs.output,
        "bytes_disk": costs.disk,
        "seconds": seconds,
    }
    if as_json:
        print(json.dumps(figures | {"identity": plan.identity()}, indent=2))
        return
    if not plan.layout.has_weights:
        print(f"{plan.model} holds no weights: this is what its config.json says.")
    print(f"{figures['blocks']} blocks with {figures['matrices']} matrices to prune:")
    for planned in plan.layout.blocks[0].matrices:
        rows, columns = planned.matrix.shape
        print(f"  {planned.tensor}  {rows} x {columns}")
    if len(plan.layout.blocks) > 1:
        print("  ... and so on in each block")
    for name in plan.layout.left_dense:
        print(f"  {name}  left dense")
    to_go = ", or ".join(
        f"{pattern} to go" + (f" and {grid} for the rest" if grid else "")
        for pattern, grid in plan.options.pairs
    )
    print(f"{plan.layout.prunable:,} prunable weights, {to_go}.")
    if plan.options.allocation_held_out:
        print("Shared out over the blocks by error, after two to four trials.")
    _print_costs(costs)
    print(f"Output: {size(costs.output)} in {len(plan.layout.shards)} files")
    print(f"Time, very roughly: {duration(seconds)}")


def _print_costs(costs: "Forecast") -> None:
    from halve.cli.console import print_table, size

    rows = [("the process itself", "", size(costs.process))]
    if costs.resident:
        rows.append(("hidden states and kept inputs", "", size(costs.resident)))
    for name, parts in costs.by_name().items():
        rows += [(name, part, size(count)) for part, count in parts.items() if count]
    print_table("", ["memory", "part", "bytes"], rows)
    print(f"Peak memory, while {costs.largest.name}: {size(costs.peak)}")
    if costs.mapped:
        print(f"Hidden states and kept inputs in mapped files: {size(costs.mapped)}")
    print(f"Disk: {size(costs.disk)}")
