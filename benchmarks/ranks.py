"""Claim: several processes prune as one does, and each of them needs less memory.

Prunes the bundled model, and a random one of the shape of OPT-1.3B cut to two blocks
(bfloat16), with one process and with several under torchrun, all on this machine and
with one thread each. Prints on how many weights the masks agree, both perplexities, and
each process's peak resident set (VmHWM).

Solvers amplify the last bits of their sums: one pruned weight more or less changes what
comes after it. So masks agree only as long as sums do, to the bit. Exits with 1 where
masks agree on less than 99.9 % of the weights, where perplexities differ by more than
0.1 %, or where a process needs as much memory as one alone.

    python benchmarks/ranks.py [--ranks 2] [--solver auto] [--samples 32]
        [--seq-len 512] [--only bundled|opt-1.3b]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe_machine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

import halve
from halve.cli import main as halve_main

BUNDLED = Path(halve.__file__).parent / "data/pycode-opt"
AGREEMENT, DIFFERENCE = 0.999, 0.001


@dataclass(frozen=True)
class PrunedBlock:
    """What some processes made of a model: the folder, MiB of each, and seconds."""

    folder: Path
    peaks: list[float]
    seconds: float


def save_model(folder: Path) -> None:
    """Write two random blocks of the shape of OPT-1.3B, and its embeddings."""
    config = OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)


def prune_and_tell(*arguments: str) -> None:
    """Run `halve`, and leave its peak in MiB in PEAKS."""
    sys.argv[1:] = arguments
    try:
        halve_main()
    finally:
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        (peak,) = [int(x.split()[1]) for x in status if x.startswith("VmHWM:")]
        place = Path(os.environ["PEAKS"]) / os.environ.get("RANK", "0")
        place.write_text(str(peak / 1024))


def prune(
    model: Path, out: Path, ranks: int, options: argparse.Namespace
) -> PrunedBlock:
    """Prune a model with so many processes."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks)]
    command += [__file__, "--child"]
    command += ["prune", str(model), "-o", str(out), "--quiet"]
    command += ["--solver", options.solver, "--calibration", "stdlib"]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as peaks:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PEAKS": peaks}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        every = [float(path.read_text()) for path in sorted(Path(peaks).iterdir())]
    return PrunedBlock(out, every, time.perf_counter() - started)


def agreement(one: Path, other: Path) -> float:
    """Return the share of prunable weights on whose pruning two folders agree."""
    same = total = 0
    for ours, theirs in _both(one, other):
        same += int(((ours == 0) == (theirs == 0)).sum())
        total += ours.numel()
    return same / total


def _both(one: Path, other: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    wanted = {matrix.tensor for matrix in halve.inspect(one).matrices}
    for path in sorted(one.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(other / path.name)
        yield from ((ours[name], theirs[name]) for name in wanted & ours.keys())


def compare(name: str, model: Path, options: argparse.Namespace) -> bool:
    """Print what one process and several make of a model; return whether all holds."""
    length = min(options.seq_len, 256 if model == BUNDLED else 2048)
    options = argparse.Namespace(**vars(options) | {"seq_len": length})
    with tempfile.TemporaryDirectory() as root:
        runs = [
            prune(model, Path(root) / str(ranks), ranks, options)
            for ranks in (1, options.ranks)
        ]
        share = agreement(*(run.folder for run in runs))
        first, second = (
            halve.perplexity(
                run.folder, data="stdlib", seq_len=length, segments=16, device="cpu"
            ).perplexity
            for run in runs
        )
    print(f"{name}, --solver {options.solver}, {options.samples} windows of {length}:")
    for run in runs:
        every = ", ".join(f"{peak:.0f}" for peak in run.peaks)
        print(f"  {len(run.peaks)} processes: {run.seconds:.0f} s, peaks {every} MiB")
    print(f"  masks agree on {share:.4%} of the weights")
    print(f"  perplexity {first:.6g} and {second:.6g}: {second / first - 1:+.4%}")
    return (
        share >= AGREEMENT
        and abs(second / first - 1) <= DIFFERENCE
        and max(runs[1].peaks) < runs[0].peaks[0]
    )


def main() -> int:
    """Compare both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", choices=["bundled", "opt-1.3b"])
    options = parser.parse_args()
    print(describe_machine())
    fine = True
    if options.only != "opt-1.3b":
        fine &= compare("pycode-opt", BUNDLED, options)
    if options.only != "bundled":
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder))
            fine &= compare("OPT-1.3B's shape, 2 blocks", Path(folder), options)
    return int(not fine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        prune_and_tell(*sys.argv[2:])
    else:
        sys.exit(main())
