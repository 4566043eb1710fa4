"""Claim: Halve prunes at least twice as fast as llm-compressor, on the same work.

Work: SparseGPT to 50 % of all 72 linear layers of a random model of the shape of
OPT-125M (float32, tied head), calibrated on 32 windows of 512 tokens, on the CPU.
llm-compressor 0.14.0.1 runs `SparseGPTModifier(sparsity=0.5, ignore=["re:.*lm_head"])`;
the pattern excludes the head, which shares its weights with the embeddings here.

Tokens: Halve draws its windows by seed from a .jsonl of this Python's standard library.
The same windows are computed beforehand and passed to llm-compressor as `input_ids`,
and their digest must equal the one in Halve's record. So Halve's time includes
tokenization and llm-compressor's does not.

Time: from the call with a model's folder to the return with the new folder written:
loading, calibration, pruning, saving. Imports are excluded for both. The tools take
turns, each run in a separate process, which also reports its processor time (core s),
which depends less on other load, and its peak resident memory. This process imports
nothing heavy, because on Linux the peak of a child starts at that of its parent.

Result: every linear layer of both outputs must be half zeros and everything else dense,
or the script fails. Prints how far the two masks agree. It prints the ratio of times
and leaves the comparison with the claim to the reader.

    python benchmarks/prune_speed.py [--rounds 3] [--rival-venv FOLDER] [--json FILE]

The rival is installed into a separate virtual environment on first use (1.5 GB).
"""
# ruff: noqa: PLC0415  (each step runs in its own process and imports what it needs)

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_RIVAL = "llm-compressor"
_TOOLS = ("halve", _RIVAL)
_PINS = ("torch==2.13.0", "llmcompressor==0.14.0.1")  # installed in this order
_SPARSITY = 0.5
_SAMPLES, _LENGTH = 32, 512
_LAYERS = 12
_MATRICES = 6 * _LAYERS  # q, k, v, out, fc1, fc2
_DOCUMENTS, _CHARACTERS = 64, 20_000


def main() -> None:
    """Measure; or, in a child process, do one step of the measurement."""
    options = _options()
    if options.step:
        result = _STEPS[options.step](options.folder)
        (options.folder / "result.json").write_text(json.dumps(result), "utf-8")
        return
    rival = _rival_python(options.rival_venv)
    with tempfile.TemporaryDirectory(prefix="prune-speed-") as name:
        report = _measure(Path(name), rival, options.rounds)
    _show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    sys.exit("\n".join(report["faults"]) or None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time Halve against llm-compressor.")
    parser.add_argument("--rounds", type=int, default=3)
    default = _ROOT / ".venv-llmcompressor"
    parser.add_argument("--rival-venv", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _rival_python(venv: Path) -> str:
    """Return the rival's interpreter, after installing the rival if it is missing."""
    python = str(venv.absolute() / "bin" / "python")
    if any(venv.glob("lib/python*/site-packages/llmcompressor")):
        return python
    print(f"Installing {', '.join(_PINS)} into {venv} ...")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    for pin in _PINS:
        subprocess.run([python, "-m", "pip", "install", "--quiet", pin], check=True)
    return python


# The measuring process.


def _measure(folder: Path, rival: str, rounds: int) -> dict[str, Any]:
    pythons = {"halve": sys.executable, _RIVAL: rival}
    prepared = _run(sys.executable, "prepare", folder)
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in _TOOLS}
    checks = []
    for number in range(1, rounds + 1):
        for tool in _TOOLS:
            runs[tool].append(_run(pythons[tool], tool, folder))
        checks.append(_run(sys.executable, "check", folder))
        print(f"Round {number} of {rounds} done.", flush=True)
        for tool in _TOOLS:
            shutil.rmtree(folder / tool)
    return {
        "machine": _machine(),
        "commit": _commit(),
        "runs": runs,
        "checks": checks,
        "faults": _faults(prepared, runs, checks),
    }


def _run(python: str, step: str, folder: Path) -> dict[str, Any]:
    """Do one step in a separate process and return its result."""
    log = folder / "log.txt"
    command = [python, __file__, "--step", step, "--folder", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        finished = subprocess.run(
            command, env=environment, stdout=output, stderr=output, check=False
        )
    if finished.returncode:
        sys.exit(f"The step {step} failed:\n{log.read_text('utf-8')[-3000:]}")
    return json.loads((folder / "result.json").read_text("utf-8"))


def _machine() -> dict[str, Any]:
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def _commit() -> str:
    """Return the commit, marked `-dirty` if the checkout has changes."""
    command = [
        "git",
        "-C",
        str(_ROOT),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()  # noqa: PLW1510


def _faults(
    prepared: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
    checks: list[dict[str, Any]],
) -> list[str]:
    """Return why the figures are invalid; empty if they are valid."""
    faults = [fault for check in checks for fault in check["faults"]]
    if any(run["windows"] != prepared["windows"] for run in runs["halve"]):
        faults.append("Halve and llm-compressor were calibrated on different tokens.")
    for pin in _PINS:
        package, _, version = pin.partition("==")
        installed = runs[_RIVAL][0]["versions"][package]
        if installed.partition("+")[0] != version:
            faults.append(
                f"The rival's environment has {package} {installed}, not {pin}."
            )
    return faults


def _show(report: dict[str, Any]) -> None:
    machine, runs = report["machine"], report["runs"]
    print(f"\nmachine  {machine['cpu']}, {machine['cores']} cores")
    print(f"python   {machine['python']}")
    print(f"commit   {report['commit']}")
    for tool in _TOOLS:
        first = runs[tool][0]
        versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
        print(f"{tool}: {versions}, {first['threads']} threads")
    print(f"\n{'round':<8}" + "".join(f"{tool:>24}" for tool in _TOOLS))
    for number, pair in enumerate(zip(*runs.values(), strict=True), start=1):
        _row(str(number), [_times(run["seconds"], run["core_seconds"]) for run in pair])
    medians = [statistics.median(r["seconds"] for r in runs[t]) for t in _TOOLS]
    cores = [statistics.median(r["core_seconds"] for r in runs[t]) for t in _TOOLS]
    peaks = [max(run["peak_bytes"] for run in runs[tool]) for tool in _TOOLS]
    _row("median", [_times(*pair) for pair in zip(medians, cores, strict=True)])
    _row("peak", [f"{peak / 2**20:.0f} MiB" for peak in peaks])
    print(f"\nHalve is {medians[1] / medians[0]:.2f} times as fast as {_RIVAL}.")
    print(f"Its peak memory is {peaks[0] / peaks[1]:.0%} of the rival's.")
    for tool, (lowest, highest) in report["checks"][-1]["zeros"].items():
        print(
            f"{tool}: {lowest:.4%} to {highest:.4%} zeros in {_MATRICES} linear layers"
        )
    print(f"The masks agree on {report['checks'][-1]['agreement']:.2%} of the weights.")


def _row(title: str, cells: list[str]) -> None:
    print(f"{title:<8}" + "".join(f"{cell:>24}" for cell in cells))


def _times(wall: float, cores: float) -> str:
    return f"{wall:.1f} s ({cores:.0f} core s)"


# The steps, each of which runs in a separate process.


def _prepare(folder: Path) -> dict[str, Any]:
    """Save the model, the text, and the windows that Halve will draw from it."""
    from halve.calibration import draw_windows, load_corpus, load_encoder

    _make_model(folder / "model")
    _make_text(folder / "text.jsonl")
    corpus = load_corpus(str(folder / "text.jsonl"), "calibration")
    encode = load_encoder(folder / "model")
    windows = draw_windows(corpus, encode, _SAMPLES, _LENGTH, seed=0)
    (folder / "windows.json").write_text(json.dumps(windows.tolist()), "utf-8")
    return {"windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest()}


def _make_model(folder: Path) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    import halve

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=768,
        word_embed_proj_dim=768,
        ffn_dim=3072,
        num_hidden_layers=_LAYERS,
        num_attention_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    OPTForCausalLM(config).float().save_pretrained(folder)
    bundled = Path(str(halve.__file__)).parent / "data" / "pycode-opt"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder)


def _make_text(path: Path) -> None:
    """Save long modules of the standard library, each as one document."""
    from halve.calibration import load_corpus

    modules = load_corpus("stdlib", "calibration").documents
    texts = [text[:_CHARACTERS] for text in modules if len(text) >= _CHARACTERS]
    lines = [json.dumps({"text": text}) for text in texts[:_DOCUMENTS]]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _halve(folder: Path) -> dict[str, Any]:
    import halve

    prune = halve.prune  # imports what it needs, before the clock starts
    started = _clocks()
    record = prune(
        folder / "model",
        folder / "halve",
        sparsity=_SPARSITY,
        solver="sparsegpt",
        calibration=str(folder / "text.jsonl"),
        samples=_SAMPLES,
        seq_len=_LENGTH,
        seed=0,
    )
    cost = _cost(started, "halve")
    return cost | {"windows": record.identity["calibration_sha256"]}


def _rival(folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
    )

    windows = json.loads((folder / "windows.json").read_text("utf-8"))
    masks = [[1] * _LENGTH for _ in windows]
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": masks})
    started = _clocks()
    oneshot(
        model=str(folder / "model"),
        dataset=dataset,
        recipe=SparseGPTModifier(sparsity=_SPARSITY, ignore=["re:.*lm_head"]),
        num_calibration_samples=_SAMPLES,
        max_seq_length=_LENGTH,
        shuffle_calibration_samples=False,
        output_dir=str(folder / _RIVAL),
    )
    return _cost(started, "llmcompressor")


def _clocks() -> tuple[float, float]:
    """Return wall-clock seconds and processor seconds."""
    return time.perf_counter(), time.process_time()


def _cost(started: tuple[float, float], package: str) -> dict[str, Any]:
    """Return the time since `started`, the peak memory, threads and versions."""
    ended = _clocks()
    import torch

    packages = (package, "torch", "transformers")
    return {
        "seconds": ended[0] - started[0],
        "core_seconds": ended[1] - started[1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _check(folder: Path) -> dict[str, Any]:
    """Compare the zeros of both folders with the claim and with each other."""
    zeros: dict[str, dict[str, Any]] = {}
    faults: list[str] = []
    for tool in _TOOLS:
        masks = _zero_masks(folder / tool)
        linear = {name: mask for name, mask in masks.items() if ".layers." in name}
        faults += _wrong_sparsity(tool, masks, linear)
        zeros[tool] = linear
    first, second = (zeros[tool] for tool in _TOOLS)
    names = first.keys() & second.keys()
    same = sum(int((first[name] == second[name]).sum()) for name in names)
    return {
        "faults": faults,
        "zeros": {tool: _extremes(linear) for tool, linear in zeros.items()},
        "agreement": same / sum(mask.numel() for mask in first.values()),
    }


def _zero_masks(folder: Path) -> dict[str, Any]:
    """Return name -> mask of its zeros, for every matrix of a folder."""
    from safetensors import safe_open

    masks = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                tensor = file.get_tensor(name)
                if tensor.dim() == 2:
                    masks[name] = tensor == 0
    return masks


def _wrong_sparsity(
    tool: str, masks: dict[str, Any], linear: dict[str, Any]
) -> list[str]:
    faults = []
    if len(linear) != _MATRICES:
        faults.append(f"{tool}: {len(linear)} linear layers, not {_MATRICES}.")
    for name, mask in masks.items():
        fraction = _fraction(mask)
        # The rival's threshold prunes one weight more in each block of columns.
        low, high = (_SPARSITY, _SPARSITY + 1e-3) if name in linear else (0, 1e-3)
        if not low <= fraction <= high:
            faults.append(f"{tool}: {name} has {fraction:.3%} zeros.")
    return faults


def _extremes(masks: dict[str, Any]) -> tuple[float, float]:
    fractions = [_fraction(mask) for mask in masks.values()]
    return min(fractions), max(fractions)


def _fraction(mask: Any) -> float:
    return int(mask.sum()) / mask.numel()


_STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prepare": _prepare,
    "halve": _halve,
    _RIVAL: _rival,
    "check": _check,
}

if __name__ == "__main__":
    main()
