"""How an output was made: the command, and what it was made with and on."""

import shlex
from collections.abc import Iterator
from typing import Any

from halve.option import options_of
from halve.options import PruneOptions, RecoverOptions
from halve.quantities import duration, size
from halve.records import MachineRecord, PruneRecord, RecoverRecord
from halve.reporting.facts import Facts, dense_name
from halve.reporting.numbers import count, counted, moment, percent, significant

# Decided by `auto` where they were not given.
_RESOLVED = {"device": "cpu"}


def commands(facts: Facts) -> list[str]:
    """Return the commands that make an output from the dense model, if recorded."""
    if facts.pruned is None:
        return []
    found: list[str] = []
    # From the last to the first. The folders between them are not recorded.
    out = facts.name
    if facts.packed is not None:
        words = ["halve", facts.packed.kind, f"{out}-source", "-o", out]
        found.append(shlex.join(words))
        out = f"{out}-source"
    if facts.recovered is not None:
        found.append(_recover_command(facts.recovered, f"{out}-source", out))
        out = f"{out}-source"
    return [prune_command(facts.pruned, out), *reversed(found)]


def _recover_command(record: RecoverRecord, model: str, out: str) -> str:
    words = ["halve", "recover", model, "--against", record.against, "-o", out]
    return shlex.join([*words, *_flags(record.identity, RecoverOptions)])


def prune_command(record: PruneRecord, out: str) -> str:
    """Return the command that prunes the model so, from what differs from defaults."""
    words = ["halve", "prune", dense_name(record) or "MODEL", "-o", out]
    return shlex.join([*words, *_flags(record.identity, PruneOptions)])


def _flags(identity: dict[str, Any], options: type) -> Iterator[str]:
    for field, option in options_of(options):
        value = identity.get(field.name, field.default)
        default = field.default
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if value in (default, _RESOLVED.get(field.name)):
            continue
        flag = option.flags[0] if option.flags else f"--{field.name.replace('_', '-')}"
        yes, _, no = flag.partition("/")
        if isinstance(value, bool):
            yield yes if value else no
            continue
        for each in value if isinstance(value, tuple) else (value,):
            yield from (yes, str(each))


def provenance(facts: Facts) -> list[tuple[str, str]]:
    """Return names and values of what is recorded of how an output was made."""
    rows = [] if facts.pruned is None else list(_of_pruning(facts.pruned))
    if facts.recovered is not None:
        rows += _of_recovery(facts.recovered)
    if facts.packed is not None:
        packed = facts.packed
        form = "packed" if packed.kind == "pack" else "unpacked"
        when = moment(packed.finished)
        rows.append((form.capitalize(), f"{when}, {_versions(packed)}"))
    rows.append(("SHA-256 of halve.json", facts.record_sha256))
    return rows


def _of_pruning(record: PruneRecord) -> Iterator[tuple[str, str]]:
    identity = record.identity
    if record.model is not None:
        model = record.model
        yield "Dense model", model.name
        if model.revision:
            yield "Its revision", model.revision
        yield "Its kind", f"{model.model_type}, {count(model.parameters)} parameters"
    if identity.get("calibration_sha256") is not None:
        windows, length = int(identity["samples"]), int(identity["seq_len"])
        own = int(identity.get("self_samples", 0))
        sampled = f", {own} windows sampled from the model" if own else ""
        yield (
            "Calibration text",
            f"{identity['calibration']}: {windows} windows of {length} tokens, "
            f"{count(windows * length)} tokens, seed {identity['seed']}{sampled}",
        )
        yield "SHA-256 of its tokens", str(identity["calibration_sha256"])
    yield "Finished", moment(record.finished)
    if record.machine is not None:
        yield "Machine", machine_line(record.machine)
    yield "Versions", _versions(record)
    yield "Time of all blocks", duration(sum(block.seconds for block in record.blocks))
    if record.bytes_peak:
        foreseen = record.bytes_foreseen
        share = f", {percent(record.bytes_peak / foreseen)} of it" if foreseen else ""
        yield (
            "Peak memory",
            f"{size(record.bytes_peak)} measured, {size(foreseen)} predicted{share}",
        )


def _of_recovery(record: RecoverRecord) -> Iterator[tuple[str, str]]:
    yield "Recovered", f"{moment(record.finished)}, {_versions(record)}"
    yield (
        "Recovery",
        f"step {record.best_step} of {record.steps}, on {record.identity['samples']} "
        f"windows of {record.identity['calibration']}; held-out divergence "
        f"{significant(record.before)} before, {significant(record.after)} after",
    )


def machine_line(machine: MachineRecord) -> str:
    """Return a machine in one line."""
    device = "" if machine.device in ("cpu", machine.cpu) else f", {machine.device}"
    return (
        f"{machine.cpu}, {counted(machine.cores, 'core')}, {size(machine.memory)}"
        f"{device}, {counted(machine.threads, 'thread')}"
    )


def _versions(record: Any) -> str:  # noqa: ANN401  (any record)
    return ", ".join(f"{name} {number}" for name, number in record.versions.items())
