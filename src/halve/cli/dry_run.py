"""What `halve prune --dry-run` prints: the cost first, then what will be done."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halve.pruning import DryRun, Forecast
    from halve.pruning.memory.gpu import GpuForecast
    from halve.pruning.plan import Plan


def print_dry_run(dry_run: "DryRun", verbose: bool) -> None:
    """Print the forecast and the plan.

    Args:
        dry_run: Both.
        verbose: Whether to list the memory of every phase, and the matrices.
    """
    _print_cost(dry_run)
    _print_plan(dry_run.plan)
    if verbose:
        _print_matrices(dry_run.plan)
        _print_phases(dry_run.forecast)


def _print_cost(dry_run: "DryRun") -> None:
    from halve.cli.console import duration, size

    forecast = dry_run.forecast
    print(f"Peak memory: {size(forecast.peak)}, while {forecast.largest.name}")
    if dry_run.gpu is not None:
        _print_gpu(dry_run.gpu)
    print(f"Disk: {size(forecast.disk)}")
    files = len(dry_run.plan.layout.files)
    plural = "file" if files == 1 else "files"
    print(f"Output: {size(forecast.output)} in {files} {plural}")
    # Rounded to a second: it is right to about a factor of two.
    print(f"Time: about {duration(round(dry_run.seconds))}, to a factor of two")


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


def _print_plan(plan: "Plan") -> None:
    layout = plan.layout
    if not layout.has_weights:
        print(f"{plan.model} holds no weights; the plan is made from its config.json.")
    matrices = sum(len(block.matrices) for block in layout.blocks)
    print(
        f"{len(layout.blocks)} blocks with {matrices} matrices: "
        f"{layout.prunable:,} weights, {_targets(plan)}."
    )
    for line in _choices(plan):
        print(line)


def _targets(plan: "Plan") -> str:
    if plan.options.leaves_weights:
        return "none of them to prune"
    return ", or ".join(
        f"{pattern} to prune" + (f" and {grid} for the rest" if grid else "")
        for pattern, grid in plan.options.pairs
    )


def _choices(plan: "Plan") -> Iterator[str]:
    """Yield a line for each option that chooses among several ways, or is a rule."""
    from halve.pruning.select.candidates import candidates

    options = plan.options
    if plan.dropping is not None:
        kept, total = plan.dropping.kept, plan.dropping.total
        yield f"Each block keeps {kept} of its {total} experts, chosen before that."
    count = len(candidates(options, plan.layout.dtype))
    if count > 1 and options.target_bits is None:
        yield f"Each matrix is pruned in {count} ways, of which the best is taken."
    if options.target_bits is not None:
        yield "Or two grids without zeros: what is best in three to seven trials."
    elif options.trial_held_out:
        yield "Distributed over the blocks by error, after two to four trials."
    rules = options.parsed_rules
    names = [m.name for block in plan.layout.blocks for m in block.matrices]
    for regex, sparsity in rules.sparsities:
        count = sum(regex.search(name) is not None for name in names)
        yield f"Rule {regex.pattern}={sparsity}: matches {count} matrices"
    for regex in rules.skipped:
        count = sum(regex.search(name) is not None for name in names)
        yield f"Skipped by {regex.pattern}: {count} matrices"


def _print_matrices(plan: "Plan") -> None:
    """Print the matrices of the first block, and what stays dense in all of them."""
    layout = plan.layout
    for planned in layout.blocks[0].matrices:
        rows, columns = planned.matrix.shape
        print(f"  {planned.tensor}  {rows} x {columns}")
    if len(layout.blocks) > 1:
        print("  ... and the same in every other block")
    for name in layout.left_dense:
        print(f"  {name}  left dense")


def _print_phases(forecast: "Forecast") -> None:
    from halve.cli.console import print_table, size

    rows = [("process", "", size(forecast.process))]
    if forecast.resident:
        rows.append(("hidden states and cached inputs", "", size(forecast.resident)))
    for name, parts in forecast.by_name().items():
        used = [(part, count) for part, count in parts.items() if count]
        # The name of a phase once, in its first row.
        labels = [name] + [""] * (len(used) - 1)
        rows += [
            (label, part, size(count))
            for label, (part, count) in zip(labels, used, strict=False)
        ]
    print_table("", ["memory", "part", "size"], rows)
    if forecast.mapped:
        mapped = size(forecast.mapped)
        print(f"Hidden states and cached inputs in memory-mapped files: {mapped}")
