"""Claims: on one NVIDIA GPU packed models are right, smaller and faster than dense.

Measures everything that Halve does on a GPU, in less than eight minutes: products with
packed matrices against torch's, decoding and prefill of random Llamas, masks on the GPU
against those on the CPU, and the pruning of a block of Llama-8B's and of OPT-175B's
size. Every part is a process of its own with a time limit, so that what fails or hangs
costs only itself.

    python benchmarks/gpu.py [OUT.json] [--parts kernels,decode]

Prints a table, and writes every figure to OUT.json as soon as it is known.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from safetensors.torch import load_file
from scale import BY_TOKENS, CONFIGS, config_of, save_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import halve
from halve.formats import FORMATS
from halve.grids import QuantScheme, fit_quant_params
from halve.measure.gpu_speed import gpu_seconds, time_decoding, time_prefill
from halve.records import Progress
from halve.runtime.cpu.layers import LAYERS
from halve.runtime.cuda.decode import prepare

# Seconds that each part may take, and all together.
LIMITS = {
    "machine": 25,
    "kernels": 110,
    "decode": 100,
    "prune": 90,
    "llama": 50,
    "opt": 130,
}
SECONDS = 470
CPU = torch.device("cpu")
SHAPES = [(4096, 4096), (11008, 4096), (14336, 4096), (28672, 8192)]
BATCHES = [1, 2, 4, 8, 16]
PROMPTS = [512, 2048]
TOKENS = 128
# Windows on which the bundled model is pruned.
SAMPLES = 32
# What share of a mask must be the CPU's, and by how much perplexity may differ.
LEAST_AGREEMENT, MOST_PERPLEXITY = 0.985, 0.005
PAPER_TOKENS = 128 * 2048
BUNDLED = Path(halve.__file__).parent / "data" / "pycode-opt"
# Largest relative error of a product against float64, by dtype.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}
LLAMAS = {
    # Width, inner width, blocks, heads, heads of keys, vocabulary.
    "llama 1.2b": (2048, 5632, 22, 32, 32, 32000),
    "llama 8b": (4096, 14336, 32, 32, 8, 128256),
}


# --- Measuring ------------------------------------------------------------------------


def tell(name: str, value: Any) -> None:
    """Print one figure for the process that collects them."""
    print("@@" + json.dumps({name: value}), flush=True)


def attempt(name: str, work: Callable[[], Any]) -> None:
    """Tell what `work` returns, or how it failed."""
    try:
        tell(name, work())
    except Exception as error:  # noqa: BLE001  (any failure is a result)
        where = traceback.format_exc().strip().splitlines()[-8:]
        tell(name, {"failed": f"{type(error).__name__}: {error}"[:500], "at": where})
    gc.collect()
    torch.cuda.empty_cache()


def seconds(calls: list[Callable[[], Any]], repeats: int = 11) -> float:
    """Return the median seconds of one of several calls, replayed as one CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    each = [first.elapsed_time(second) for first, second in pairwise(marks)]
    return statistics.median(each) / len(calls) / 1e3


def machine() -> None:
    """Tell the bandwidths and rates of this GPU, which bound everything else."""
    tell("gpu", [torch.cuda.get_device_name(), *torch.cuda.mem_get_info()])
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target, words = torch.empty_like(source), source.view(torch.int64)
    taken = seconds([partial(target.copy_, source)] * 3)
    tell("copy, TB/s read and written", 2 * source.numel() / taken / 1e12)
    tell("read, TB/s", source.numel() / seconds([words.sum] * 3) / 1e12)
    source = target = words = torch.empty(0)  # freed
    for dtype, precision in (
        (torch.bfloat16, "highest"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        x = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        rate = 2 * 8192**3 / seconds([partial(torch.mm, x, x)] * 2)
        tell(f"product of {dtype}, {precision}, TFLOP/s", rate / 1e12)


# --- Products -------------------------------------------------------------------------


def sparse_weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a random matrix, half of it zeros, on the GPU."""
    weight = torch.randn(rows, columns, device="cuda").mul_(0.02)
    weight[torch.rand(rows, columns, device="cuda") < 0.5] = 0
    return weight.to(dtype)


def bitmask_layer(weight: Tensor) -> nn.Module:
    """Return a layer that stores the nonzero weights only."""
    packed = FORMATS["bitmask"].pack(weight, False, None)
    assert packed is not None
    # As a layer gets to a GPU: loaded on the CPU, then moved.
    return LAYERS["bitmask"](packed, None).to("cpu").to("cuda")


def quantized_layer(bits: int, rows: int, columns: int) -> tuple[nn.Module, Tensor]:
    """Return a layer of integer codes in groups of 128, and its dense matrix."""
    scheme = QuantScheme(bits, group_size=128)
    matrix = torch.randn(rows, columns, device="cuda")
    params = fit_quant_params(scheme, matrix)
    rounded = params.fake_quantize(matrix).bfloat16()
    packed = FORMATS["quantized"].pack(rounded.cpu(), False, params.to(CPU))
    assert packed is not None
    return LAYERS["quantized"](packed, None).to("cuda"), rounded


def error(layer: nn.Module, weight: Tensor, batch: int) -> float:
    """Return the relative error of a layer's product against float64."""
    x = torch.randn(batch, weight.shape[1], device="cuda").to(weight.dtype)
    wanted = x.double() @ weight.double().T
    return float((layer(x).double() - wanted).norm() / wanted.norm())


def agreement(dtype: torch.dtype, rows: int, columns: int) -> dict[str, Any]:
    """Return whether products and unpacking are right for all kinds of batches."""
    weight = sparse_weight(rows, columns, dtype)
    layer = bitmask_layer(weight)
    errors = {batch: error(layer, weight, batch) for batch in (1, 2, 3, 8, 13, 16, 200)}
    same = torch.equal(layer.to_dense().weight, weight)  # pyright: ignore
    right = max(errors.values()) < ROUNDING[dtype] and same
    return {"right": right, "unpacks": same, "errors": errors}


def quantized_agreement(bits: int) -> dict[str, Any]:
    """Return whether products with integer codes are right."""
    layer, dense = quantized_layer(bits, 96, 1024)
    errors = {batch: error(layer, dense, batch) for batch in (1, 3, 16, 200)}
    right = max(errors.values()) < ROUNDING[torch.bfloat16]
    return {"right": right, "errors": errors}


def race(rows: int, columns: int) -> dict[str, Any]:
    """Time torch's dense product and the packed one, with more bytes than the L2."""
    copies = max(min(2**28 // (rows * columns), 12), 2)
    dense = [sparse_weight(rows, columns, torch.bfloat16) for _ in range(copies)]
    layers = [bitmask_layer(weight) for weight in dense]
    stored = sum(tensor.nbytes for tensor in layers[0].state_dict().values())
    found: dict[str, Any] = {"bytes": [dense[0].nbytes, stored]}
    for batch in [*BATCHES, 64, *PROMPTS]:
        x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
        theirs = seconds([partial(functional.linear, x, weight) for weight in dense])
        ours = seconds([partial(layer, x) for layer in layers])
        found[f"x{batch}"] = {
            "times torch": theirs / ours,
            "us": [1e6 * theirs, 1e6 * ours],
            "TB/s": [dense[0].nbytes / theirs / 1e12, stored / ours / 1e12],
        }
    return found


def quantized_race(bits: int) -> dict[str, Any]:
    """Time torch's dense product and one with integer codes."""
    rows, columns = 8192, 4096
    layer, dense = quantized_layer(bits, rows, columns)
    # More than the L2 holds, so that each product reads its weights from memory.
    layers = [layer, *(copy.deepcopy(layer) for _ in range(9))]
    weights = [dense, *(dense.clone() for _ in range(2))]
    found = {}
    for batch in (1, 2, 16, 512):
        x = torch.randn(batch, columns, device="cuda", dtype=torch.bfloat16)
        theirs = seconds([partial(functional.linear, x, weight) for weight in weights])
        ours = seconds([partial(each, x) for each in layers])
        found[f"x{batch}"] = [theirs / ours, 1e6 * theirs, 1e6 * ours]
    return found


def kernels() -> None:
    """Tell whether products are right, then how fast they are."""
    for dtype in ROUNDING:
        for shape in ((33, 1000), (512, 4096), (65, 66)):
            attempt(f"right: {dtype} {shape}", partial(agreement, dtype, *shape))
    for bits in (2, 3, 4, 8):
        attempt(f"right: int{bits}", partial(quantized_agreement, bits))
    for shape in SHAPES:
        attempt(f"race {shape}", partial(race, *shape))
    for bits in (4, 8, 3, 2):
        attempt(f"race int{bits}", partial(quantized_race, bits))


# --- Models ---------------------------------------------------------------------------


def random_llama(name: str) -> Any:
    """Return a random Llama on the GPU, half of whose weights are zero."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "vocab_size")
    config = AutoConfig.for_model(
        "llama", **dict(zip(names, LLAMAS[name], strict=True))
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for _, layer in linear_layers(model):
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0
    return model


def linear_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the linear layers of all blocks."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in path
    ]


def pack_layers(model: nn.Module) -> None:
    """Replace the linear layers of all blocks by packed ones."""
    for path, layer in linear_layers(model):
        model.set_submodule(path, bitmask_layer(layer.weight.data))


@torch.inference_mode()
def timed_model(model: Any, batch: int) -> dict[str, Any]:
    """Return milliseconds of a decoded token and of prompts, and GiB of the weights."""
    device = torch.device("cuda", 0)
    clock = partial(gpu_seconds, device=device)
    found = {"GiB": sum(t.nbytes for t in model.state_dict().values()) / 2**30}
    for length in PROMPTS if batch == 1 else ():
        ids = torch.randint(30000, (1, length), device=device)
        found[f"prompt of {length}, ms"] = 1e3 * time_prefill(model, ids, clock)
    prepare(model)
    ids = torch.randint(30000, (batch, 16), device=device)
    taken, how = time_decoding(model, ids, TOKENS, clock)
    return found | {"token, ms": 1e3 * taken / TOKENS, "decoded by": how}


def decode_one(name: str, batch: int) -> dict[str, Any]:
    """Compare a random Llama, dense and packed."""
    model = random_llama(name)
    ids = torch.randint(30000, (batch, 8), device="cuda")
    with torch.inference_mode():
        wanted = model(ids).logits.double()
    found: dict[str, Any] = {"dense": timed_model(model, batch)}
    tell(f"{name} x{batch} so far", found)
    pack_layers(model)
    with torch.inference_mode():
        change = model(ids).logits.double() - wanted
    found["packed"] = timed_model(model, batch)
    found["differs"] = float(change.norm() / wanted.norm())
    ratios = {
        name: value / found["packed"][name]
        for name, value in found["dense"].items()
        if isinstance(value, float)
    }
    return found | {"dense / packed": ratios}


def decode() -> None:
    """Tell how fast random Llamas decode and read prompts."""
    for name in LLAMAS:
        for batch in (1, 8):
            attempt(f"{name} x{batch}", partial(decode_one, name, batch))


# --- Pruning --------------------------------------------------------------------------


@contextmanager
def pruned(device: str, **options: Any) -> Iterator[Path]:
    """Prune the bundled model to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        halve.prune(BUNDLED, out, calibration="stdlib", device=device, **options)
        yield out


def prune_one(**options: Any) -> dict[str, Any]:
    """Prune on the CPU and on the GPU; compare masks and perplexity."""
    found: dict[str, Any] = {}
    masks: dict[str, dict[str, Tensor]] = {}
    for device in ("cpu", "cuda"):
        begun = time.perf_counter()
        # Refused on the CPU, where products are float32.
        own = options if device == "cuda" else options | {"matmul_precision": "highest"}
        with pruned(device, samples=SAMPLES, **own) as out:
            taken = time.perf_counter() - begun
            judged = halve.perplexity(out, data="stdlib", segments=64, device="cuda")
            files = out.glob("*.safetensors")
            tensors = {n: t for path in files for n, t in load_file(path).items()}
        masks[device] = {n: t == 0 for n, t in tensors.items() if t.dim() == 2}
        found[device] = {"s": taken, "perplexity": judged.perplexity}
    same = [
        float((masks["cpu"][n] == m).float().mean()) for n, m in masks["cuda"].items()
    ]
    found |= {"masks agree": sum(same) / len(same), "least": min(same)}
    if options["solver"] == "sparsegpt":  # others choose between solutions as well
        ratio = found["cuda"]["perplexity"] / found["cpu"]["perplexity"]
        close = abs(ratio - 1) <= MOST_PERPLEXITY
        found["right"] = found["masks agree"] >= LEAST_AGREEMENT and close
    return found


def prune() -> None:
    """Tell how far the GPU's results are from the CPU's."""
    high = {"matmul_precision": "high"}
    ways: list[dict[str, Any]] = [
        {"sparsity": "50%"},
        {"sparsity": "2:4"},
        {"sparsity": "50%", **high},
        {"sparsity": "50%", "quantize": "int4"},
        {"sparsity": "50%", "solver": "auto"},
    ]
    for way in ways:
        attempt(f"prune {way}", partial(prune_one, **{"solver": "sparsegpt"} | way))


def block_one(name: str, samples: int, precision: str) -> dict[str, Any]:
    """Prune one block of true size; return seconds and peak GiB of each phase."""
    phases: list[tuple[str, float, float]] = []
    last, begun = "starting", time.perf_counter()

    def note(progress: Progress) -> None:
        nonlocal last, begun
        torch.cuda.synchronize()
        now, peak = time.perf_counter(), torch.cuda.max_memory_allocated() / 2**30
        phases.append((last, now - begun, peak))
        last, begun = progress.phase, now
        tell(f"{name}, {precision}, so far", phases)
        torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        save_model(model, config_of(name, 1), "cuda")
        begun = time.perf_counter()
        halve.prune(
            *(model, out),
            solver="sparsegpt",
            calibration="stdlib",
            samples=samples,
            seq_len=2048,
            device="cuda",
            matmul_precision=precision,
            progress=note,
        )
        note(Progress(0, 1, "finished"))
    return extrapolated(name, samples, phases)


def extrapolated(
    name: str, samples: int, phases: list[tuple[str, float, float]]
) -> dict[str, Any]:
    """Return the seconds of phases, and the hours of the whole model on 128 windows."""
    ratio, blocks = PAPER_TOKENS / (samples * 2048), CONFIGS[name][-1]
    whole = sum(
        taken * blocks * (ratio if phase in BY_TOKENS else 1)
        for phase, taken, _ in phases
        if phase != "starting"
    )
    return {
        "phases": phases,
        "block, s": sum(taken for phase, taken, _ in phases if phase != "starting"),
        "peak, GiB": max(peak for *_, peak in phases),
        "whole model on 128 windows, h": whole / 3600,
    }


def llama() -> None:
    """Tell the phases of a block of Llama-8B's size."""
    attempt("llama-8b block", partial(block_one, "llama-8b", 128, "highest"))


def opt() -> None:
    """Tell the phases of a block of OPT-175B's size."""
    for precision, samples in (("high", 128), ("highest", 32)):
        work = partial(block_one, "opt-175b", samples, precision)
        attempt(f"opt-175b block, {precision}, {samples} windows", work)


# --- All parts ------------------------------------------------------------------------

PARTS = {
    "machine": machine,
    "kernels": kernels,
    "decode": decode,
    "prune": prune,
    "llama": llama,
    "opt": opt,
}


def run_part(part: str, limit: float) -> dict[str, Any]:
    """Run one part in a process of its own and collect what it tells."""
    begun, lines = time.monotonic(), []
    command = [sys.executable, __file__, "--child", part]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with tempfile.TemporaryFile("w+") as log:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                timeout=limit,
                check=False,
            )
        log.seek(0)
        lines = log.read().splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line[2:]) if line.startswith("@@") else {}
    others = [line for line in lines if line and not line.startswith("@@")]
    taken = round(time.monotonic() - begun, 1)
    return found | {"log": others[-15:], "s": taken, "cut off": taken >= limit}


def failures(found: dict[str, Any]) -> list[str]:
    """Return what failed or is wrong."""
    wrong = []
    for part, figures in found.items():
        wrong += [f"{part} was cut off"] * figures.get("cut off", False)
        for name, value in figures.items():
            if isinstance(value, dict) and (
                "failed" in value or value.get("right") is False
            ):
                wrong.append(f"{part}, {name}: {value}")
    return wrong


def report(found: dict[str, Any]) -> None:
    """Print every figure, a line each."""
    for part, figures in found.items():
        print(f"\n{part} ({figures['s']} s)")
        for name, value in figures.items():
            if name.endswith("so far") and name.removesuffix(" so far") in figures:
                continue
            if name not in ("s", "log", "cut off"):
                print(f"  {name}: {shortened(value)}")
        if not any(name not in ("s", "log", "cut off") for name in figures):
            print("  " + "\n  ".join(figures["log"]))


def shortened(value: Any) -> str:
    """Return a value with its numbers rounded to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {shortened(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shortened(v) for v in value) + "]"
    return str(value)


def main() -> int:
    """Run all parts, write their figures, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        PARTS[options.child]()
        return 0
    if not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU that torch can use.")
        return 1
    print(describe_machine(), flush=True)
    begun, found = time.monotonic(), {}
    for part in options.parts.split(","):
        left = SECONDS - (time.monotonic() - begun)
        found[part] = run_part(part, max(min(left, LIMITS[part]), 1))
        options.out.write_text(json.dumps(found, indent=1))
    report(found)
    wrong = failures(found)
    print("\n" + ("\n".join(["FAILED:", *wrong]) if wrong else "everything is right"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
