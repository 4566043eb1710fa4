"""Claim: one block of OPT-175B's size is pruned within 22 GiB, as the dry run predicts.

Saves a model with few blocks of a published shape (random weights in 16 bits, a small
vocabulary), prunes it in a separate process, and prints the seconds and the peak memory
of each phase. Extrapolates them to the whole model on the paper's 128 windows of 2048
tokens: forward passes grow with the tokens, solving and writing do not, and all blocks
take the same. Exits with 1 if the peak exceeds `--limit`, which is passed to the run as
its `--memory`, or is not within 15 % of what the dry run predicts.

    python benchmarks/scale.py --config opt-175b --blocks 1 [--samples 4] [--limit 22]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

import halve
from halve.models import build_meta_model
from halve.records import Progress

BUNDLED = Path(str(files("halve") / "data" / "pycode-opt"))
PAPER_TOKENS = 128 * 2048
# How far the peak may be from its prediction.
MARGIN = 0.15
# Phases whose time is proportional to the tokens.
BY_TOKENS = ("collecting", "summing", "propagating", "refining")
# Name -> family, width, inner width, heads, blocks.
CONFIGS = {
    "opt-1.3b": ("opt", 2048, 8192, 32, 24),
    "opt-13b": ("opt", 5120, 20480, 40, 40),
    "opt-30b": ("opt", 7168, 28672, 56, 48),
    "opt-66b": ("opt", 9216, 36864, 72, 64),
    "opt-175b": ("opt", 12288, 49152, 96, 96),
    "bloom-176b": ("bloom", 14336, 57344, 112, 70),
    "llama-8b": ("llama", 4096, 14336, 32, 32),
    "llama-70b": ("llama", 8192, 28672, 64, 80),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 768, 32, 48),
    "gpt-oss-120b": ("gpt_oss", 2880, 2880, 64, 36),
}
# Mixtures: 128 experts each, so many of them for a token.
MIXTURES = {"qwen3_moe": 8, "gpt_oss": 4}
HEAD_DIMENSIONS = {"qwen3_moe": 128, "gpt_oss": 64}


def config_of(name: str, blocks: int) -> PretrainedConfig:
    """Return the config of a published shape with few blocks and a small vocabulary."""
    family, width, inner, heads, _ = CONFIGS[name]
    options = {
        "opt": {"ffn_dim": inner, "word_embed_proj_dim": width},
        "llama": {"intermediate_size": inner, "num_key_value_heads": 8},
        "bloom": {},
        "qwen3_moe": {"moe_intermediate_size": inner, "num_key_value_heads": 4},
        "gpt_oss": {"intermediate_size": inner, "num_key_value_heads": 8},
    }
    if family in MIXTURES:
        mixture = {"head_dim": HEAD_DIMENSIONS[family], "num_local_experts": 128}
        options[family] |= mixture | {"num_experts_per_tok": MIXTURES[family]}
    return AutoConfig.for_model(
        family,
        vocab_size=4096,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        **options[family],
    )


def save_mixture(folder: Path, config: PretrainedConfig) -> None:
    """Save a mixture with random weights, in the tensors of its checkpoints."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)


def save_model(folder: Path, config: PretrainedConfig, device: str = "cpu") -> None:
    """Save random weights, one tensor per file, so that only one is in memory.

    They are drawn on the device.
    """
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    tensors = build_meta_model(folder).model.state_dict()
    files_by_tensor = {}
    for number, (name, meta) in enumerate(tensors.items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        files_by_tensor[name] = f"model-{number:05}.safetensors"
        value = torch.empty(meta.shape, dtype=torch.float16, device=device)
        if meta.dim() > 1:
            for row in value.split(1024):
                row.normal_(std=0.02)
        else:
            value.fill_(float(name.endswith("weight")))
        save_file({name: value.cpu()}, folder / files_by_tensor[name], {"format": "pt"})
    index = {"metadata": {}, "weight_map": files_by_tensor}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak() -> float:
    """Return the peak resident set since the last call, in GiB."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM:")]
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) / 2**20


def prune(folder: Path, options: argparse.Namespace) -> None:
    """Prune in this process; print the name, seconds and peak of each phase as JSON.

    What the dry run predicts, in GiB, comes first.
    """
    task = {
        "solver": options.solver,
        "calibration": "stdlib",
        "samples": options.samples,
        "seq_len": options.seq_len,
        "device": options.device,
        "memory": int(options.limit * 2**30),
    }
    forecast = halve.plan(folder / "model", **task).forecast
    print(json.dumps(forecast.peak / 2**30), flush=True)
    started, last = time.perf_counter(), "starting"

    def report_phase(progress: Progress) -> None:
        nonlocal started, last
        now = time.perf_counter()
        print(json.dumps([last, now - started, peak()]), flush=True)
        started, last = now, progress.phase

    halve.prune(folder / "model", folder / "out", **task, progress=report_phase)
    report_phase(Progress(0, 1, "finished"))


def measured(folder: str, options: argparse.Namespace) -> Iterator[Any]:
    """Prune in a separate process; yield the prediction, then phases as they end."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        sys.exit(f"pruning {options.config} failed")


def report(phases: list[list], options: argparse.Namespace) -> None:
    """Print the total of each phase, and the extrapolation to the whole model."""
    token_ratio = PAPER_TOKENS / (options.samples * options.seq_len)
    total = 0.0
    depth = CONFIGS[options.config][-1] / options.blocks
    for name in dict.fromkeys(name for name, *_ in phases):
        seconds = sum(s for n, s, _ in phases if n == name)
        peak_gib = max(m for n, _, m in phases if n == name)
        print(f"  {name:12} {seconds:8.1f} s  peak {peak_gib:6.2f} GiB")
        if name != "starting":
            total += seconds * depth * (token_ratio if name in BY_TOKENS else 1)
    hidden = PAPER_TOKENS * CONFIGS[options.config][1] * 4 / 2**30
    print(
        f"the whole model on 128 windows of 2048 tokens: {total / 3600:.1f} h, the "
        f"same memory, and {hidden:.0f} GiB of hidden states in memory or on disk"
    )


def main() -> int:
    """Measure one shape and compare its peak with the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="opt-175b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=22, help="in GiB")
    parser.add_argument("--work", help="folder for the model and the output")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        prune(Path(options.child), options)
        return 0
    print(describe_machine())
    print(f"{options.config}, {options.blocks} blocks, {options.solver}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        config = config_of(options.config, options.blocks)
        save = save_mixture if config.model_type in MIXTURES else save_model
        save(Path(folder) / "model", config)
        predicted, *phases = measured(folder, options)
    report(phases, options)
    highest = max(memory for *_, memory in phases)
    print(f"peak {highest:.2f} GiB of {options.limit:g}, predicted {predicted:.2f}")
    is_near = abs(predicted / highest - 1) <= MARGIN
    return int(highest > options.limit or not is_near)


if __name__ == "__main__":
    sys.exit(main())
