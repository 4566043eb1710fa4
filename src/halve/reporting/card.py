"""The model card: facts to `README.md` for the Hub."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from halve.quantities import size
from halve.reporting.facts import Facts
from halve.reporting.numbers import percent, significant, with_error
from halve.reporting.provenance import commands, machine_line, provenance
from halve.reporting.sections import limits
from halve.reporting.summary import speedup, verdict
from halve.reporting.templates import environment

# The first line of the text of a card that may be overwritten.
CARD_MARK = "<!-- made by halve report -->"
_CARD = "---\n{{ card_data }}\n---\n{{ body }}\n"
# A name on the Hub, of a model or a data set.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def render_card(facts: Facts) -> str:
    """Return the card of an output as Markdown with metadata for the Hub.

    It holds no number that is not in the facts. The same facts give the same text.
    """
    card = ModelCard.from_template(
        _metadata(facts), template_str=_CARD, body=_body(facts)
    )
    return str(card)


def _body(facts: Facts) -> str:
    # Markdown escapes otherwise than HTML: each value is escaped here.
    template = environment(autoescape=False).get_template("card.md.j2")
    return template.render(
        mark=CARD_MARK,
        title=_plain(facts.name),
        verdict=_plain(verdict(facts)),
        rows=[[_cell(cell) for cell in row] for row in _rows(facts)],
        is_packed=_is_packed(facts),
        quoted_name=json.dumps(facts.name),
        commands=[_line(command) for command in commands(facts)],
        provenance=[(name, _code(value)) for name, value in provenance(facts)],
        measured=[_plain(line) for line in _measured(facts)],
        limits=[_plain(limit) for limit in limits(facts)],
    )


def _metadata(facts: Facts) -> ModelCardData:
    base = _base_model(facts)
    known: dict[str, Any] = {"license": facts.license} if facts.license else {}
    if base:
        # The Hub knows finetune, quantized, adapter and merge; this is the nearest.
        known |= {"base_model": base, "base_model_relation": "quantized"}
    return ModelCardData(
        library_name="halve" if _is_packed(facts) else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(facts),
        **known,
    )


def _base_model(facts: Facts) -> str:
    """Return the dense model's name on the Hub; "" if it has none."""
    model = facts.pruned and facts.pruned.model
    is_on_hub = model and model.revision and _HUB_NAME.fullmatch(model.name)
    return model.name if model and is_on_hub else ""


def _tags(facts: Facts) -> list[str]:
    tags = ["halve", "pruned", "sparse"]
    if facts.pruned is not None:
        tags += sorted({m.solver for m in facts.pruned.all_matrices if m.solver})
        tags += ["quantized"] if any(m.grid for m in facts.pruned.all_matrices) else []
    return tags


def _is_packed(facts: Facts) -> bool:
    if facts.packed is not None:
        return facts.packed.kind == "pack"
    return bool(facts.pruned and facts.pruned.identity.get("packed"))


def _rows(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows of what is compared: name, dense, this, ratio."""
    stored, dense = facts.sizes.stored.total, facts.sizes.dense
    if dense is not None:
        share = percent(stored / dense.total)
        yield "bytes of all tensors", size(dense.total), size(stored), share
    if facts.comparison is not None:
        record = facts.comparison.result
        before, after = record.reference, record.model
        yield (
            f"perplexity, {after.data}",
            with_error(before.perplexity, before.standard_error),
            with_error(after.perplexity, after.standard_error),
            significant(after.perplexity / before.perplexity, 4),
        )
    if facts.bench is not None and (faster := speedup(facts.bench.result)) is not None:
        yield (
            f"tokens/s, {faster.torch.test}, torch and packed",
            with_error(faster.torch.mean, faster.torch.deviation),
            with_error(faster.packed.mean, faster.packed.deviation),
            significant(faster.ratio),
        )
    if facts.tasks is not None:
        yield from _task_rows(facts)


def _task_rows(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    assert facts.tasks is not None
    record = facts.tasks.result
    dense = {(score.task, score.metric): score for score in record.reference}
    for score in record.model:
        other = dense.get((score.task, score.metric))
        yield (
            f"{score.task}, {score.metric}",
            with_error(other.value, other.stderr) if other else "",
            with_error(score.value, score.stderr),
            percent(score.value / other.value) if other and other.value else "",
        )


def _measured(facts: Facts) -> Iterator[str]:
    """Yield what was measured, and the command that does."""
    if facts.comparison is not None:
        record, name = facts.comparison.result, facts.name
        model = record.model
        kl = with_error(record.kl_mean, record.kl_error)
        words = ["halve", "eval", name, "--against", facts.comparison.by.reference]
        words += ["--data", model.data, "--seq-len", str(model.seq_len)]
        words += ["--segments", str(model.segments)]
        yield (
            f"KL divergence from the dense model: {kl} nats a token on average, "
            f"{significant(record.kl_quantiles['99.9'])} at most for 99.9 % of the "
            f"tokens; the same first choice for {percent(record.agreement)}. "
            f"{shlex.join(words)}"
        )
    if facts.bench is not None:
        by = facts.bench.by
        where = facts.bench.result.gpu or machine_line(by.machine)
        yield f"Speed on {where}. {shlex.join(['halve', 'bench', facts.name])}"
    if facts.tasks is not None:
        yield "Tasks by lm-evaluation-harness, with standard errors."


def render_eval_results(facts: Facts) -> dict[str, str]:
    """Return file -> YAML of the scores in tasks whose data set is on the Hub."""
    if facts.tasks is None:
        return {}
    found: dict[str, str] = {}
    for score in facts.tasks.result.model:
        if not _HUB_NAME.fullmatch(score.dataset):
            continue
        shots = "" if score.shots is None else f", {score.shots}-shot"
        entry = EvalResultEntry(
            dataset_id=score.dataset,
            task_id=score.task,
            value=score.value,
            date=facts.tasks.by.finished,
            notes=f"{score.metric}{shots}, lm-evaluation-harness",
        )
        name = re.sub(r"[^\w-]", "_", score.task)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        found[f".eval_results/{name}.yaml"] = text
    return found


def _line(text: str) -> str:
    """Return a text as one line, without characters that cannot be seen."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def _plain(text: str) -> str:
    """Return a text in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _line(text))


def _cell(text: str) -> str:
    return _plain(text) or " "


def _code(text: str) -> str:
    """Return a text as inline code, in which Markdown and HTML mean nothing."""
    return f"`{_line(text).replace('`', chr(39))}`"
