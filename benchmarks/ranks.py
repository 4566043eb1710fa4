"""Claim: several processes prune as one does, and each of them takes less memory.

Prunes the bundled model, and a random one of the shape of OPT-1.3B cut to two blocks
(bfloat16), with one process and with several under torchrun, all on this machine with
one thread each. Prints the fraction of weights on which the masks agree, both
perplexities, and the peak resident set of each process (VmHWM).

Solvers amplify differences in the last bits of their sums, since a weight that is
pruned or not changes all that follow. So masks agree only where sums do, to the bit.
Exits with 1 if masks agree on less than 99.9 % of the weights, if perplexities differ
by more than 0.1 %, or if a process takes as much memory as one alone.

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
# The least agreement of masks, and the largest relative difference of perplexity.
MIN_AGREEMENT, MAX_DIFFERENCE = 0.999, 0.001


@dataclass(frozen=True)
class Run:
    """One pruning run.

    Attributes:
        folder: The pruned model.
        peaks: Peak resident set of each process, in MiB.
        seconds: Wall time.
    """

    folder: Path
    peaks: list[float]
    seconds: float


def save_model(folder: Path) -> None:
    """Save two random blocks of the shape of OPT-1.3B, and its embeddings."""
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


def prune_and_measure(*arguments: str) -> None:
    """Run `halve`, and write its peak in MiB into the folder $PEAKS."""
    sys.argv[1:] = arguments
    try:
        halve_main()
    finally:
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        (peak,) = [int(x.split()[1]) for x in status if x.startswith("VmHWM:")]
        file = Path(os.environ["PEAKS"]) / os.environ.get("RANK", "0")
        file.write_text(str(peak / 1024))


def prune(model: Path, out: Path, ranks: int, options: argparse.Namespace) -> Run:
    """Prune a model with a number of processes."""
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
        peaks_mib = [float(path.read_text()) for path in sorted(Path(peaks).iterdir())]
    return Run(out, peaks_mib, time.perf_counter() - started)


def agreement(one: Path, other: Path) -> float:
    """Return the fraction of prunable weights on which two folders' masks agree."""
    same = total = 0
    for first, second in _both(one, other):
        same += int(((first == 0) == (second == 0)).sum())
        total += first.numel()
    return same / total


def _both(one: Path, other: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    names = {matrix.tensor for matrix in halve.inspect(one).matrices}
    for path in sorted(one.glob("*.safetensors")):
        first, second = load_file(path), load_file(other / path.name)
        yield from ((first[name], second[name]) for name in names & first.keys())


def compare(name: str, model: Path, options: argparse.Namespace) -> bool:
    """Prune a model with one process and with several; return if the claim holds."""
    length = min(options.seq_len, 256 if model == BUNDLED else 2048)
    options = argparse.Namespace(**vars(options) | {"seq_len": length})
    with tempfile.TemporaryDirectory() as root:
        runs = [
            prune(model, Path(root) / str(ranks), ranks, options)
            for ranks in (1, options.ranks)
        ]
        fraction = agreement(*(run.folder for run in runs))
        first, second = (
            halve.perplexity(
                run.folder, data="stdlib", seq_len=length, segments=16, device="cpu"
            ).perplexity
            for run in runs
        )
    print(f"{name}, --solver {options.solver}, {options.samples} windows of {length}:")
    for run in runs:
        peaks = ", ".join(f"{peak:.0f}" for peak in run.peaks)
        print(f"  {len(run.peaks)} processes: {run.seconds:.0f} s, peaks {peaks} MiB")
    print(f"  masks agree on {fraction:.4%} of the weights")
    print(f"  perplexity {first:.6g} and {second:.6g}: {second / first - 1:+.4%}")
    return (
        fraction >= MIN_AGREEMENT
        and abs(second / first - 1) <= MAX_DIFFERENCE
        and max(runs[1].peaks) < runs[0].peaks[0]
    )


def main() -> int:
    """Compare runs on both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", choices=["bundled", "opt-1.3b"])
    options = parser.parse_args()
    print(describe_machine())
    holds = True
    if options.only != "opt-1.3b":
        holds &= compare("pycode-opt", BUNDLED, options)
    if options.only != "bundled":
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder))
            holds &= compare("OPT-1.3B's shape, 2 blocks", Path(folder), options)
    return int(not holds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        prune_and_measure(*sys.argv[2:])
    else:
        sys.exit(main())
