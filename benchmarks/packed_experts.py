"""Claim: packed experts decode faster than transformers runs them dense.

Is a packed mixture of experts at least 1.3 times as fast at 1 and 4 tokens as
`grouped_mm`, transformers' default, on the same pruned weights, and never slower than
0.95 times at 32 and 256? Saves a random mixture with 32 experts a block of
Qwen3-30B-A3B's shape (hidden 2048, inner 768, eight experts a token), prunes half of
the weights, packs it, and loads both by `from_pretrained`. Times one forward pass of a
token for each of several sequences, and the modules of experts alone, in turns; prints
medians. Exits with 1 where the modules of experts miss the claim.

    python benchmarks/packed_experts.py [--rounds 15] [--threads N] [--quantize int4]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import halve
from halve.models import experts_in
from halve.runtime.cpu.packed_experts import packed_experts_in

# Tokens of a pass -> the least ratio of speeds.
CLAIMS = {1: 1.3, 4: 1.3, 32: 0.95, 256: 0.95}
BLOCKS = 2
EXPERTS, EXPERTS_PER_TOKEN = 32, 8


def save_mixture(folder: Path) -> None:
    """Save random weights in bfloat16: 0.7 GB, most of them in experts."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def prepare(home: Path, quantize: str | None) -> dict[str, Any]:
    """Return the pruned mixture as transformers runs it, and packed."""
    save_mixture(home / "random")
    options: dict[str, Any] = {"quantize": quantize} if quantize else {}
    halve.prune(home / "random", home / "dense", solver="magnitude", **options)
    halve.pack(home / "dense", home / "packed")
    return {
        name: AutoModelForCausalLM.from_pretrained(home / name).eval()
        for name in ("dense", "packed")
    }


def decoding(model: Any, tokens: int) -> Callable[[], object]:
    """Return a pass of one token for each of so many sequences, after eight others."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4096, (tokens, 8), generator=generator)
    past = model(ids, use_cache=True).past_key_values

    def step() -> object:
        state = model(ids[:, -1:], past_key_values=past, use_cache=True)
        past.crop(-1)
        return state

    return step


def experts_alone(model: Any, tokens: int) -> Callable[[], object]:
    """Return a call of every module of experts with random choices."""
    modules = [*(packed_experts_in(model) or experts_in(model)).values()]
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 2048, generator=generator).bfloat16()
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, index = scores.softmax(-1).topk(EXPERTS_PER_TOKEN)
    return lambda: [module(hidden, index, weights.bfloat16()) for module in modules]


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Return the median seconds of each call, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(own[1:]) for name, own in times.items()}


@torch.inference_mode()
def measure(models: dict[str, Any], rounds: int) -> dict[int, float]:
    """Print a row for each number of tokens; return the ratios of experts alone."""
    print(
        "| tokens | what | grouped_mm, ms | packed, ms | ratio |\n|--:|---|--:|--:|--:|"
    )
    ratios: dict[int, float] = {}
    for tokens in CLAIMS:
        for what, make in (("whole step", decoding), ("experts", experts_alone)):
            calls = {name: make(model, tokens) for name, model in models.items()}
            dense, packed = interleaved(calls, rounds).values()
            ratios[tokens] = dense / packed
            print(
                f"| {tokens} | {what} | {1e3 * dense:.2f} | {1e3 * packed:.2f} "
                f"| {dense / packed:.2f} |",
                flush=True,
            )
    return ratios


def main() -> int:
    """Measure, and return 1 if the claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quantize", help="such as int4: codes instead of bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as home:
        ratios = measure(prepare(Path(home), arguments.quantize), arguments.rounds)
    missed = {n: r for n, r in ratios.items() if r < CLAIMS[n]}
    for tokens, ratio in missed.items():
        print(f"MISSED: {ratio:.2f} at {tokens} tokens, not {CLAIMS[tokens]}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
