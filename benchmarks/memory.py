"""Claim: peak memory does not grow with the depth of the model.

Prunes random models of 6 and of 24 blocks of one shape on the same samples, each in a
process of its own, and compares their peak resident sets. Exits with 1 where the
deeper one needs over 10 % more.

    python benchmarks/memory.py [--width 1024] [--samples 32] [--seq-len 256]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import halve

BUNDLED = Path(halve.__file__).parent / "data/pycode-opt"
LIMIT = 1.10


def save_model(folder: Path, depth: int, width: int) -> None:
    """Write a random Llama-shaped model in bfloat16."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)


def prune(folder: str, samples: int, length: int) -> None:
    """Prune in this process and print its peak resident set, in MiB."""
    with tempfile.TemporaryDirectory() as out:
        halve.prune(
            folder,
            Path(out) / "pruned",
            solver="sparsegpt",
            calibration="stdlib",
            samples=samples,
            seq_len=length,
            device="cpu",
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak}))


def measure(depth: int, options: argparse.Namespace) -> float:
    """Return the peak of a model of some depth, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), depth, options.width)
        command = [sys.executable, __file__, "--child", folder]
        command += ["--samples", str(options.samples)]
        command += ["--seq-len", str(options.seq_len)]
        output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])["peak_mib"]


def main() -> int:
    """Measure both depths and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        prune(options.child, options.samples, options.seq_len)
        return 0
    print(describe_machine())
    shallow, deep = (measure(depth, options) for depth in (6, 24))
    print(f"peak resident set, 6 blocks of width {options.width}: {shallow:.0f} MiB")
    print(f"peak resident set, 24 blocks: {deep:.0f} MiB, {deep / shallow:.3f} times")
    return int(deep > LIMIT * shallow)


if __name__ == "__main__":
    sys.exit(main())
