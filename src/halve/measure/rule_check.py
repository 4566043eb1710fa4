"""Whether the matrices of a record have the patterns that its rules ask for."""

from collections.abc import Iterator

from halve.errors import HalveError
from halve.options.rules import Rules, parse_rules
from halve.patterns import parse_pattern
from halve.records import Finding, MatrixRecord, PruneRecord

# The pattern of a matrix that is left as it is.
_UNCHANGED = "0%"


def rule_mismatches(record: PruneRecord) -> Iterator[Finding]:
    """Yield the matrices whose recorded pattern is not the one that a rule asks for."""
    try:
        rules = _rules(record)
        for matrix in record.all_matrices if rules else ():
            wanted = _pattern(rules, matrix, record.identity["sparsity"])
            if matrix.pattern != wanted:
                problem = (
                    f"its pattern is {matrix.pattern}, not {wanted} as by the rules"
                )
                yield Finding(matrix.tensor, problem)
    except (HalveError, TypeError, LookupError) as error:
        yield Finding("halve.json", f"its rules cannot be read ({error})")


def _rules(record: PruneRecord) -> Rules:
    rules, skip = (record.identity.get(name) or [] for name in ("rules", "skip"))
    return parse_rules(rules, skip, allow_dense=True)


def _pattern(rules: Rules, matrix: MatrixRecord, sparsity: str) -> str:
    if rules.skips(matrix.tensor):
        return _UNCHANGED
    wanted = rules.sparsity(matrix.tensor) or sparsity
    return str(parse_pattern(wanted, allow_dense=True))
