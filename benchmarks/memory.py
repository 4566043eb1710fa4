"""Claims: the dry run predicts peak memory, which does not grow with depth.

Prunes models of several shapes, the bundled one and random ones, each in a separate
process, and compares the peak of its resident set with the prediction of `halve prune
--dry-run`. Exits with 1 if any differs by more than 15 %, or if a model of 24 blocks
takes over 10 % more than one of 6.

    python benchmarks/memory.py [--solvers sparsegpt auto] [--shapes bundled small]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halve

BUNDLED = files("halve") / "data" / "pycode-opt"
# The largest relative error of a prediction, and the most that 24 blocks take of 6.
MAX_ERROR, MAX_GROWTH = 0.15, 1.10
# Name -> family, width, inner width, blocks, samples, tokens per sample.
SHAPES: dict[str, tuple[str, int, int, int, int, int]] = {
    "small": ("opt", 512, 2048, 4, 64, 256),
    "6 blocks": ("llama", 1024, 4096, 6, 32, 256),
    "24 blocks": ("llama", 1024, 4096, 24, 32, 256),
    "1.3 B": ("opt", 2048, 8192, 24, 8, 512),
    "7 B, 4 blocks": ("llama", 4096, 11008, 4, 8, 512),
}


def save_model(folder: Path, shape: tuple[str, int, int, int, int, int]) -> None:
    """Save a random model in bfloat16."""
    family, width, inner, depth, _, _ = shape
    options = {"opt": {"ffn_dim": inner, "word_embed_proj_dim": width}}
    config = AutoConfig.for_model(
        family,
        vocab_size=4096,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        **options.get(family, {"intermediate_size": inner}),
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)


def peak_of(command: list[str]) -> tuple[int, str]:
    """Run Halve in a separate process; return its peak resident set and its output."""
    program = (
        "import sys; from halve.cli.app import main; sys.argv[0] = 'halve'\n"
        "try: main()\n"
        "finally: print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *command],
        check=True,
        capture_output=True,
        text=True,
    )
    line = next(x for x in finished.stderr.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024, finished.stdout


def measure(name: str, solver: str) -> tuple[int, int]:
    """Return the predicted and the measured peak of a shape, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model, size = Path(folder) / "model", (128, 256)
        if name == "bundled":
            model = Path(str(BUNDLED))
        else:
            save_model(model, SHAPES[name])
            size = SHAPES[name][-2:]
        command = ["prune", str(model), "-o", f"{folder}/out", "--solver", solver]
        command += ["--samples", str(size[0]), "--seq-len", str(size[1])]
        command += ["--calibration", "stdlib", "--device", "cpu", "--quiet"]
        _, plan = peak_of([*command, "--dry-run", "--json"])
        peak, _ = peak_of(command)
    return json.loads(plan)["bytes_peak"], peak


def main() -> int:
    """Compare prediction and measurement of all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solvers", nargs="+", default=["sparsegpt", "auto"])
    parser.add_argument("--shapes", nargs="+", default=["bundled", *SHAPES])
    options = parser.parse_args()
    print(describe_machine(), f"halve {halve.__version__}", sep="\n")
    holds = True
    for solver in options.solvers:
        peaks: dict[str, int] = {}
        for name in options.shapes:
            predicted, peaks[name] = measure(name, solver)
            error = predicted / peaks[name] - 1
            holds &= abs(error) <= MAX_ERROR
            print(
                f"{solver:10} {name:14} predicted {predicted / 2**20:7.0f} MiB, "
                f"measured {peaks[name] / 2**20:7.0f} MiB: {100 * error:+.1f} %",
                flush=True,
            )
        if {"6 blocks", "24 blocks"} <= peaks.keys():
            growth = peaks["24 blocks"] / peaks["6 blocks"]
            print(f"{solver:10} 24 blocks take {growth:.3f} times what 6 blocks take")
            holds &= growth <= MAX_GROWTH
    print("held" if holds else "MISSED")
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
