"""The page: facts to HTML. Pure: no files but the templates, no clock."""

import shlex
from typing import Any

from halve.records import PruneRecord
from halve.reporting.facts import Facts
from halve.reporting.numbers import moment
from halve.reporting.provenance import commands, machine_line, provenance
from halve.reporting.sections import (
    allocation_section,
    blocks_section,
    heat_section,
    limits,
    predictions_section,
    samples_section,
    size_section,
    speed_section,
    tasks_section,
)
from halve.reporting.summary import tiles, verdict
from halve.reporting.templates import environment


def render(facts: Facts) -> str:
    """Return the page about an output as HTML.

    The output is deterministic and self-contained: no script, no external resource.
    Names and texts are escaped.
    """
    template = environment(autoescape=True).get_template("page.html.j2")
    return template.render(_context(facts))


def _context(facts: Facts) -> dict[str, Any]:
    """Return what the template shows; None for a section without data."""
    pruned = facts.pruned
    return {
        "facts": facts,
        "verdict": verdict(facts),
        "origin": _origin(facts),
        "tiles": tiles(facts),
        "heat": pruned and heat_section(pruned),
        "blocks": pruned and blocks_section(pruned),
        "allocation": pruned and allocation_section(pruned),
        "predictions": predictions_section(facts),
        "samples": samples_section(facts),
        "size": size_section(facts),
        "speed": speed_section(facts),
        "tasks": tasks_section(facts),
        "commands": commands(facts),
        "provenance": provenance(facts),
        "verify": shlex.join(["halve", "verify", facts.name]),
        "limits": limits(facts),
    }


def _origin(facts: Facts) -> str:
    """Return when, on what and with which versions it was made."""
    record = facts.pruned or facts.packed
    if record is None:
        return ""
    parts = [moment(record.finished)]
    if isinstance(record, PruneRecord) and record.machine is not None:
        parts.append(machine_line(record.machine))
    parts += [f"{name} {number}" for name, number in record.versions.items()]
    return " · ".join(parts)
