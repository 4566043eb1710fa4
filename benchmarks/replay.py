"""Claim: a refactoring changes no byte of any output.

Prunes eight tiny families in eight ways each and writes down the SHA-256 of every
safetensors file that results. Given the list of another commit, made on the same
machine with the same number of threads, it exits with 1 where a file differs. The last
bits of a matrix product depend on the processor, so lists of different machines must
not be compared.

    python benchmarks/replay.py --write before.json
    python benchmarks/replay.py --compare before.json [--families opt llama]
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import halve

BUNDLED = files("halve") / "data" / "pycode-opt"
WIDTH, INNER = 160, 320
_COMMON = {"vocab_size": 4096, "bos_token_id": 2, "eos_token_id": 2}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 256}
_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Family -> model type, config, dtype of the weights.
FAMILIES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "opt": (
        "opt",
        {
            "hidden_size": WIDTH,
            "ffn_dim": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": WIDTH,
        },
        torch.float16,
    ),
    "bloom": (
        "bloom",
        {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
        torch.float32,
    ),
    "gpt2": ("gpt2", _GPT2, torch.float32),
    "llama": ("llama", _LLAMA, torch.bfloat16),
    "falcon": (
        "falcon",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4},
        torch.bfloat16,
    ),
    "mpt": (
        "mpt",
        {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
        torch.bfloat16,
    ),
    "gemma3": (
        "gemma3_text",
        _LLAMA | {"head_dim": 40, "sliding_window": 32},
        torch.bfloat16,
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 40}, torch.bfloat16),
}
# Way -> options that `halve.prune` is called with.
WAYS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"solver": "sparsegpt"},
    "auto": {},
    "auto --refine": {"refine": True, "epochs": 2},
    "--quantize int4": {"quantize": "int4"},
    "--target-bits 3.1": {"target_bits": 3.1, "group_size": 160},
    "2:4": {"sparsity": "2:4"},
    "--pack": {"packed": True},
    "--allocation error": {"allocation": "error"},
}
# 32 windows of 64 tokens: two batches to fit, and two that are held out.
SIZES: dict[str, Any] = {"samples": 32, "seq_len": 64}
# The longest modules that a Python 3.11 and newer has under these names.
MODULES = ("argparse.py", "inspect.py", "tarfile.py", "typing.py")


def main() -> int:
    """Run the table; write the list, or compare with one."""
    options = _arguments()
    disable_progress_bar()
    print(describe_machine(), f"halve {halve.__version__}", sep="\n", flush=True)
    found = _replay(options.families, options.ways)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if not options.compare:
        return 0
    expected = json.loads(options.compare.read_text())
    different = [run for run in found if found[run] != expected.get(run)]
    for run in different:
        print(f"DIFFERENT: {run}")
    print(f"{len(found) - len(different)} of {len(found)} runs give the same bytes")
    return int(bool(different))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="write the list of digests here")
    parser.add_argument("--compare", type=Path, help="compare with this list")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    return parser.parse_args()


def _replay(families: list[str], ways: list[str]) -> dict[str, dict[str, str]]:
    """Return run -> file -> SHA-256."""
    torch.set_num_threads(2)  # another number may sum in another order
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = _text(Path(folder) / "text.txt")
        for family in families:
            model = _model(Path(folder) / family, family)
            for way in ways:
                started = time.monotonic()
                out = Path(folder) / f"{family}-{len(found)}"
                options: dict[str, Any] = WAYS[way] | SIZES | {"calibration": str(text)}
                halve.prune(model, out, device="cpu", **options)
                found[f"{family}, {way}"] = _digests(out)
                seconds = time.monotonic() - started
                print(f"{family}, {way}: {seconds:.1f} s", flush=True)
    return found


def _text(path: Path) -> Path:
    """Write the calibration text: a few modules of this Python's library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    path.write_text("\n".join((root / name).read_text("utf-8") for name in MODULES))
    return path


def _model(folder: Path, family: str) -> Path:
    """Write a random model of two blocks, the same for the same torch."""
    kind, entries, dtype = FAMILIES[family]
    config = AutoConfig.for_model(kind, **(_COMMON | entries))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def _digests(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*.safetensors"))
    }


if __name__ == "__main__":
    sys.exit(main())
