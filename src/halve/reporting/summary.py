"""What a page says first: a sentence, and six figures."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import stdev

from halve.quantities import size
from halve.records import BenchRecord, ComparisonRecord, SpeedRecord
from halve.reporting.facts import Facts, dense_name
from halve.reporting.numbers import counted, percent, significant, with_error


@dataclass(frozen=True)
class Tile:
    """One of the figures.

    Attributes:
        label: What it is.
        value: The number; empty if it was not measured.
        note: What it is based on.
        command: The command that measures it.
    """

    label: str
    value: str
    note: str = ""
    command: str = ""


@dataclass(frozen=True)
class Speedup:
    """How much faster one sequence is decoded packed than by torch.

    Attributes:
        packed: Packed, on Halve's kernels.
        torch: Dense, in torch.
    """

    packed: SpeedRecord
    torch: SpeedRecord

    @property
    def ratio(self) -> float:
        """Quotient of the medians of tokens per second."""
        return self.packed.median / self.torch.median


def speedup(record: BenchRecord) -> Speedup | None:
    """Return the speedup of decoding with the smallest batch; None if none was timed.

    The test is `tg128` or the like.
    """
    rates = {(r.backend, r.test): r for r in record.results}
    decoded = [r for r in record.results if r.test.startswith("tg")]
    for result in sorted(decoded, key=lambda r: r.batch):
        torch = rates.get(("torch", result.test))
        packed = rates.get(("halve packed", result.test))
        if torch is not None and packed is not None:
            return Speedup(packed, torch)
    return None


def perplexity_difference(record: ComparisonRecord) -> tuple[float, float | None]:
    """Return the difference of both perplexities, and its standard error.

    Both models read the same segments, whose difficulty then cancels: the error comes
    from the differences of the segments' losses, not from the losses. With
    p = exp(mean l), dp = p dl, so p_model l_model - p_reference l_reference varies from
    segment to segment as the difference does.
    """
    model, reference = record.model, record.reference
    difference = model.perplexity - reference.perplexity
    pairs = zip(model.losses, reference.losses, strict=False)
    terms = [model.perplexity * a - reference.perplexity * b for a, b in pairs]
    if len(terms) < 2:  # noqa: PLR2004
        return difference, None
    return difference, stdev(terms) / len(terms) ** 0.5


def sparsity(facts: Facts) -> float | None:
    """Return the fraction of zeros in the prunable matrices."""
    record = facts.packed or facts.pruned
    if record is None:
        return None
    zeros = sum(m.sparsity * m.rows * m.columns for m in record.all_matrices)
    return zeros / facts.sizes.prunable


def verdict(facts: Facts) -> str:
    """Return one sentence of what was measured."""
    text = "; ".join(_clauses(facts))
    return text[:1].upper() + text[1:] + "."


def _clauses(facts: Facts) -> Iterator[str]:
    zeros = sparsity(facts)
    if zeros is not None:
        yield f"{percent(zeros)} of the prunable weights are zero"
    if facts.pruned is not None and facts.pruned.bits is not None:
        yield f"as packed codes they take {significant(facts.pruned.bits)} bits each"
    if facts.comparison is not None:
        yield from _comparison_clauses(facts.comparison.result)
    elif facts.perplexity is not None:
        record = facts.perplexity.result
        value = with_error(record.perplexity, record.standard_error)
        yield f"perplexity {value} on {record.data}"
    if facts.bench is not None and (faster := speedup(facts.bench.result)) is not None:
        ratio, where = significant(faster.ratio), facts.bench.result
        name = where.gpu or f"{where.cpu} with {counted(where.threads, 'thread')}"
        yield f"packed it decodes {ratio} times as fast as torch on {name}"


def _comparison_clauses(record: ComparisonRecord) -> Iterator[str]:
    before, after = record.reference.perplexity, record.model.perplexity
    difference = with_error(*perplexity_difference(record))
    yield (
        f"perplexity {significant(before, 4)} becomes {significant(after, 4)} on "
        f"{record.model.data}, a difference of {difference}"
    )
    yield f"{percent(record.agreement)} of the first choices stay"


def tiles(facts: Facts) -> list[Tile]:
    """Return the six figures; what was not measured says so."""
    return [
        _zeros_tile(facts),
        _bytes_tile(facts),
        *_comparison_tiles(facts),
        _speed_tile(facts),
    ]


def measure_command(facts: Facts) -> str:
    """Return the command that measures everything."""
    dense = dense_name(facts.pruned) or "DENSE"
    words = ["halve", "report", facts.name, "--measure", "--against", dense]
    return shlex.join(words)


def _zeros_tile(facts: Facts) -> Tile:
    zeros = sparsity(facts)
    record = facts.packed or facts.pruned
    count = len(record.all_matrices) if record is not None else 0
    value = "" if zeros is None else percent(zeros)
    return Tile("Zeros", value, f"of the weights of {count} matrices")


def _bytes_tile(facts: Facts) -> Tile:
    stored, dense = facts.sizes.stored.total, facts.sizes.dense
    if dense is None or dense.total == stored:
        return Tile("Size", size(stored), "of all tensors, stored dense")
    share = percent(stored / dense.total)
    note = f"{share} of the dense model, all tensors"
    return Tile("Size", f"{size(dense.total)} → {size(stored)}", note)


def _comparison_tiles(facts: Facts) -> Iterator[Tile]:
    names = ("Perplexity", "KL divergence", "Same first choice")
    if facts.comparison is None:
        alone = facts.perplexity and facts.perplexity.result
        value = with_error(alone.perplexity, alone.standard_error) if alone else ""
        note = f"on {alone.data}; the dense model's is not known" if alone else ""
        command = measure_command(facts)
        yield Tile(names[0], value, note, command)
        yield from (Tile(name, "", command=command) for name in names[1:])
        return
    record = facts.comparison.result
    before, after = record.reference.perplexity, record.model.perplexity
    difference = with_error(*perplexity_difference(record))
    yield Tile(
        names[0],
        f"{significant(before, 4)} → {significant(after, 4)}",
        f"difference {difference} on {record.model.data}",
    )
    yield Tile(
        names[1], with_error(record.kl_mean, record.kl_error), "nats a token, mean"
    )
    error = None if record.agreement_error is None else 100 * record.agreement_error
    yield Tile(names[2], with_error(100 * record.agreement, error, " %"), "of tokens")


def _speed_tile(facts: Facts) -> Tile:
    faster = None if facts.bench is None else speedup(facts.bench.result)
    if faster is None:
        command = shlex.join(["halve", "bench", facts.name, "--keep"])
        return Tile("Tokens/s", "", command=command)
    rates = [significant(each.median) for each in (faster.torch, faster.packed)]
    ratio, test = significant(faster.ratio), faster.torch.test
    note = f"medians of torch and packed: {ratio} times ({test})"
    return Tile("Tokens/s", f"{rates[0]} → {rates[1]}", note)
