"""What each section of a page shows, as values for its template.

A function returns None where there is nothing to show: what was not measured or
recorded is left out, never guessed.
"""

from collections.abc import Sequence
from typing import Any

from halve.records import (
    ComparisonRecord,
    ContinuationRecord,
    GeneratedToken,
    PassageToken,
    PerplexityRecord,
    PruneRecord,
)
from halve.reporting.facts import Facts, Measured
from halve.reporting.figures import (
    blocks_figure,
    divergence_figure,
    heat_figure,
    is_varying,
    sizes_figure,
    sparsities_figure,
    speed_figure,
)
from halve.reporting.heat import (
    all_numbers,
    error_of,
    heat_map,
    matrix_rows,
    sparsity_of,
    zeros_text,
)
from halve.reporting.numbers import (
    count,
    counted,
    moment,
    percent,
    significant,
    with_error,
)
from halve.reporting.provenance import machine_line
from halve.reporting.tasks import TASK_COLUMNS, task_rows

# A section for the template.
Section = dict[str, Any]
# Divergences, in nats, at which the colour of a token changes.
_STEPS = (0.01, 0.05, 0.2, 1.0)


def heat_section(record: PruneRecord) -> Section | None:
    """Return the maps of errors and, where it varies, of sparsity."""
    errors = heat_map(record.blocks, error_of, all_numbers)
    sparsities = [m.sparsity for m in record.all_matrices]
    varies = is_varying(sparsities)
    return {
        "figure": heat_figure(errors, "Error of each matrix of each block")
        if errors.highest
        else None,
        "grouped": sum(map(len, errors.cells)) < len(record.all_matrices),
        "highest": percent(errors.highest),
        "held_out": any(m.held_out is not None for m in record.all_matrices),
        "sparsity": heat_figure(
            heat_map(record.blocks, sparsity_of, zeros_text, from_zero=False),
            "Zeros of each matrix of each block",
        )
        if varies
        else None,
        "rows": matrix_rows(record.blocks),
    }


def blocks_section(record: PruneRecord) -> Section | None:
    """Return the errors of all blocks."""
    figure = blocks_figure(record.blocks)
    if figure is None:
        return None
    return {"figure": figure, "is_refined": any(b.refined for b in record.blocks)}


def allocation_section(record: PruneRecord) -> Section | None:
    """Return the trials of the whole model, and what was chosen by them."""
    names = [block.name for block in record.blocks]
    if record.allocation is not None:
        chosen = record.allocation
        head = ["Strength", "KL divergence, nats", ""]
        rows = [
            (
                significant(trial.strength),
                significant(trial.divergence),
                "taken" if trial.strength == chosen.strength else "",
            )
            for trial in chosen.trials
        ]
        figure = sparsities_figure([b.sparsity for b in record.blocks], names)
        return {"figure": figure, "head": head, "rows": rows}
    if record.mix is not None:
        head = ["Zeros and grids", "Bits a weight", "KL divergence, nats", ""]
        rows = [
            (
                trial.name,
                significant(trial.bits),
                significant(trial.divergence),
                "taken" if trial.name == record.mix.name else "",
            )
            for trial in record.mix.trials
        ]
        return {"figure": None, "head": head, "rows": rows}
    return None


def predictions_section(facts: Facts) -> Section | None:
    """Return the distribution of the divergence, and all evaluations."""
    if facts.comparison is None:
        return None
    record, model = facts.comparison.result, facts.comparison.result.model
    error = None if record.agreement_error is None else 100 * record.agreement_error
    return {
        "figure": divergence_figure(record),
        "caption": f"{count(model.tokens)} tokens of {model.data}, "
        f"{model.segments} segments of {model.seq_len} tokens; compared with "
        f"{facts.comparison.by.reference}.",
        "quantiles": [
            (f"{per_cent} %", significant(value))
            for per_cent, value in record.kl_quantiles.items()
        ],
        "sentence": f"Mean {with_error(record.kl_mean, record.kl_error)} nats. Both "
        f"models rank the same token first for "
        f"{with_error(100 * record.agreement, error, ' %')} of the tokens.",
        "others": _evaluations(facts),
    }


def _evaluations(facts: Facts) -> list[tuple[str, ...]]:
    """Return a row for each evaluation, if there are several."""
    compared = facts.of_kind(ComparisonRecord)
    alone = facts.of_kind(PerplexityRecord)
    rows = [_compared_row(each) for each in compared]
    rows += [
        (r.data, "", with_error(r.perplexity, r.standard_error), "", "")
        for r in (each.result for each in alone)
    ]
    return rows if len(rows) > 1 else []


def _compared_row(measured: Measured[ComparisonRecord]) -> tuple[str, ...]:
    record = measured.result
    return (
        record.model.data,
        measured.by.reference,
        with_error(record.model.perplexity, record.model.standard_error),
        with_error(record.kl_mean, record.kl_error),
        percent(record.agreement),
    )


def samples_section(facts: Facts) -> Section | None:
    """Return the passage and the continuations."""
    if facts.samples is None:
        return None
    record = facts.samples.result
    predicted = [token for token in record.passage if token.kl is not None]
    differing = sum(not token.same_first for token in predicted)
    names = [f"below {_STEPS[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in zip(_STEPS, _STEPS[1:])]  # noqa: B905,RUF007
    return {
        "data": record.data,
        "steps": [*names, f"above {_STEPS[-1]:g}"],
        "count": f", {differing} of {len(predicted)} here",
        "passage": [_shown_token(token) for token in record.passage],
        "continuations": [_shown_texts(each) for each in record.continuations],
    }


def _shown_token(token: PassageToken) -> Section:
    """Return the text, the classes and the hint of a token."""
    step = sum(token.kl >= limit for limit in _STEPS) if token.kl is not None else 0
    styles = ([f"k{step}"] if step else []) + ([] if token.same_first else ["other"])
    title = ""
    if token.kl is not None:
        title = f"KL {significant(token.kl, 2)}"
        if not token.same_first:
            title += (
                f"; dense would say {token.reference_first!r}, pruned "
                f"{token.model_first!r}"
            )
    return {"text": token.text, "style": " ".join(styles), "title": title}


def _shown_texts(record: ContinuationRecord) -> Section:
    same, of = record.same, max(len(record.model), len(record.reference))
    return {
        "prompt": record.prompt,
        "sentence": f"The first {same} of {of} tokens are the same."
        if same < of
        else f"All {of} tokens are the same.",
        "reference": _split(record.reference, same),
        "model": _split(record.model, same),
    }


def _split(tokens: Sequence[GeneratedToken], same: int) -> Section:
    texts = [token.text for token in tokens]
    return {"common": "".join(texts[:same]), "rest": "".join(texts[same:])}


def size_section(facts: Facts) -> Section:
    """Return the bytes of the model, dense and as stored."""
    stored, dense = facts.sizes.stored, facts.sizes.dense
    is_smaller = dense is not None and dense.total != stored.total
    rows = [("dense", dense)] if dense is not None and is_smaller else []
    rows.append(("packed" if is_smaller or dense is None else "pruned", stored))
    bits = 8 * stored.matrices / facts.sizes.prunable
    caption = (
        "Bytes of all tensors in the files. The prunable matrices take "
        f"{significant(bits)} bits a weight."
    )
    if not is_smaller and dense is not None:
        caption += " Zeros are stored like other weights: halve pack saves their bytes."
    return {"figure": sizes_figure(rows), "caption": caption}


def speed_section(facts: Facts) -> Section | None:
    """Return the tokens per second of each backend."""
    if facts.bench is None or not facts.bench.result.results:
        return None
    record, by = facts.bench.result, facts.bench.by
    used = [
        f"{r.backend} {percent(r.bandwidth / record.bandwidth)}"
        for r in record.results
        if r.test.startswith("tg") and r.batch == 1 and record.bandwidth
    ]
    share = f" Of its memory bandwidth one sequence takes: {', '.join(used)}."
    versions = ", ".join(f"{name} {number}" for name, number in by.versions.items())
    return {
        "figure": speed_figure(record),
        "rounds": len(record.results[0].seconds),
        "sentence": f"{record.gpu or record.cpu}, "
        f"{counted(record.threads, 'thread')}, kernel "
        f"{record.kernel}, {significant(record.bandwidth / 1e9)} GB/s; measured "
        f"{moment(by.finished)} with {versions}."
        f"{share if used else ''}",
    }


def tasks_section(facts: Facts) -> Section | None:
    """Return the scores in tasks, and how much of the dense model's is left."""
    if facts.tasks is None:
        return None
    return {
        "rows": task_rows(facts.tasks.result),
        "columns": TASK_COLUMNS,
        "note": "By lm-evaluation-harness, with standard errors.",
    }


def limits(facts: Facts) -> list[str]:
    """Return what the numbers do not cover."""
    found = []
    if facts.comparison is not None:
        record = facts.comparison.result.model
        found.append(
            f"Perplexity and divergence are those of {record.segments} segments of "
            f"{record.seq_len} tokens of {record.data}. Other texts, and longer ones, "
            "give other numbers; perplexities of different lengths or tokenizers are "
            "not comparable."
        )
        found.append(
            "Both models were evaluated block by block in float32; a model that runs "
            "in 16 bits, or packed, rounds otherwise."
        )
    if facts.samples is not None:
        found.append(
            "The texts above are a few hundred tokens: an example, not a measurement."
        )
    if facts.bench is not None:
        found.append(
            "Speed was measured once, on one machine, which may have had other work to "
            f"do: {machine_line(facts.bench.by.machine)}."
        )
    if facts.tasks is None:
        found.append("No task, such as questions with known answers, was evaluated.")
    found.append(
        "What was not measured is left out. Checksums detect damage, not forgery: "
        "whoever can change the files can write new checksums."
    )
    return found
