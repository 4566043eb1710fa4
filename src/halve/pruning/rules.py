"""What rules say of the matrices of a model (`--rule`, `--skip`)."""

from halve.layout import Layout
from halve.options import PruneOptions
from halve.patterns import Unstructured
from halve.pruning.select.candidates import candidates
from halve.pruning.select.selection import Candidate
from halve.solvers import Magnitude

# Prunes nothing, and so leaves every bit of a matrix as it is.
_UNCHANGED = Candidate("skipped", Magnitude(), Unstructured(0.0))


def matrix_names(layout: Layout) -> list[str]:
    """Return the names of all prunable matrices, in the order of the model."""
    return [m.name for block in layout.blocks for m in block.matrices]


def skipped_matrices(layout: Layout, options: PruneOptions) -> frozenset[str]:
    """Return the names of the matrices that are left as they are."""
    rules = options.parsed_rules
    return frozenset(name for name in matrix_names(layout) if rules.skips(name))


def ruled_candidates(
    layout: Layout, options: PruneOptions
) -> dict[str, tuple[Candidate, ...]]:
    """Return the candidates of each matrix that a rule, or skip, says something of.

    Args:
        layout: Names of the matrices, and their dtype.
        options: The rules, and everything else that makes a candidate.
    """
    if not options.parsed_rules:
        return {}
    skipped = skipped_matrices(layout, options)
    ruled = {name: options.for_matrix(name) for name in matrix_names(layout)}
    return {
        name: candidates(own, layout.dtype)
        for name, own in ruled.items()
        if own != options and name not in skipped
    } | dict.fromkeys(skipped, (_UNCHANGED,))
