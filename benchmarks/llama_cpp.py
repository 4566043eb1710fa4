"""Question: at equal bits, does Halve or llama.cpp lose less, and which is faster?

Quality: quantizes the matrices of the blocks of one model with types of llama.cpp and
with grids of Halve, and compares each with the dense model on the same tokens: KL
divergence, perplexity, how often the most likely token is the same. llama.cpp gets an
importance matrix from the same windows on which Halve is calibrated, and one type for
all matrices (`llama-quantize --pure`). Embeddings, norms and head stay dense in both;
bits per weight are those of the matrices that are quantized. All models run in torch in
float32, so this compares weights and not kernels.

Speed: decodes with random Llamas of 1.2 billion weights of each type, and of Halve's
packed formats, in interleaved rounds. Embeddings and head are bfloat16 in both.

There is no claim to fail: prints the results, adds them to `results.json` in the work
folder, and draws all that it has (`--svg`). A work folder belongs to one model and one
text. By default the model is that of `smollm2.py` and the text Python's standard
library; of a file (`--text`) calibration gets the first half and evaluation the second.
Building llama.cpp takes ten minutes on two cores and is done once. Outputs of Halve are
kept in the work folder: the same command resumes an interrupted run. Needs the package
`gguf`.

    python benchmarks/llama_cpp.py [--quick] [--parts quality speed] [--svg FILE]
        [--model FOLDER] [--text FILE] [--samples 64] [--segments 40] [--seq-len 512]
        [--types Q3_K ...] [--grids int3:128 int2:64:asymmetric 57%:int3:128 ...]
        [--solvers sparsegpt auto refined] [--packed FOLDER ...] [--threads 1 2]
        [--build build/llama.cpp] [--work build/llama-cpp-bench]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decode_speed import Decoder
from divergence import Divergence, Judge, cut_text
from ggml import PACKAGE, LlamaCpp, bits_per_weight, build_llama_cpp
from machine import describe_machine
from smollm2 import fetch_real_model
from svg_chart import Panel, Point, draw
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import halve
from halve.calibration import draw_windows, load_corpus, load_encoder
from halve.measure import write_random_model
from halve.patterns import parse_pattern
from halve.runtime.cpu.quantized_operators import ACTIVATIONS

HALVE, RIVAL = "Halve", "llama.cpp"
TYPES = (
    *("Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_XS"),
    *("Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XS"),
)
GRIDS = (
    *("int3:128", "int3:128:asymmetric", "int2:64", "int2:64:asymmetric"),
    *("int2:128", "int2:128:asymmetric"),
)
SOLVERS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"solver": "sparsegpt"},
    "auto": {"solver": "auto"},
    "refined": {"solver": "auto", "refine": True},
}
# The default model was quantized to 4 bits before; only fewer are worth drawing.
MAX_DRAWN_BITS = 4
# Options that --quick sets, to see in minutes whether everything works.
QUICK: dict[str, Any] = {
    "samples": 8,
    "segments": 4,
    "types": ["Q3_K", "Q2_K"],
    "grids": ["int3:128"],
    "solvers": ["sparsegpt"],
    "size": "110m",
    "rounds": 2,
}


def main() -> int:
    """Measure the requested parts, print and save them."""
    task = arguments()
    disable_progress_bar()
    print(describe_machine())
    print(f"rival: {PACKAGE}")
    task.work.mkdir(parents=True, exist_ok=True)
    rival = build_llama_cpp(task.build)
    results = Results(task.work / "results.json")
    for part in task.parts:
        for row in PARTS[part](task, rival):
            results.add(part, row)
    if task.svg:
        task.svg.write_text(draw(panels(results)), "utf-8")
    return 0


class Results:
    """Rows of both parts, saved as soon as each is measured.

    Rows of earlier calls stay until the same one is measured again, so parts of the
    tables can be measured one by one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def add(self, part: str, row: dict) -> None:
        """Save a row."""
        key = f"{row['family']} {row['name']} {row.get('threads', '')}".strip()
        self._rows.setdefault(part, {})[key] = row
        self._path.write_text(json.dumps(self._rows, indent=2) + "\n", "utf-8")

    def rows(self, part: str) -> list[dict]:
        """Return the rows of a part."""
        return list(self._rows.get(part, {}).values())


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--build", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--work", type=Path, default=Path("build/llama-cpp-bench"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--segments", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--grids", nargs="*", default=GRIDS)
    parser.add_argument("--solvers", nargs="*", default=["sparsegpt", "auto"])
    parser.add_argument("--packed", nargs="*", type=Path, default=[])
    parser.add_argument("--size", default="1.2b")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


# Quality.


def quality(task: argparse.Namespace, rival: LlamaCpp) -> Iterator[dict]:
    """Print and yield a row for each type of llama.cpp and each grid of Halve."""
    task.model = task.model or fetch_real_model(task.work / "smollm2-135m")
    task.calibration, task.evaluation = split_text(task)
    dense = load_float32(task.model)
    sizes = task.seq_len, task.segments
    judge = Judge(dense, cut_text(task.model, task.evaluation, *sizes))
    print_row("", "dense", 16, judge.dense)
    yield from rival_rows(task, rival, judge, dense)
    yield from halve_rows(task, judge)


def split_text(task: argparse.Namespace) -> tuple[str, str]:
    """Return the names of the texts for calibration and for evaluation."""
    if not task.text:
        return "stdlib", "stdlib"
    text = task.text.read_text("utf-8")
    middle = text.index("\n", len(text) // 2) + 1
    parts = {"calibration": text[:middle], "evaluation": text[middle:]}
    for name, part in parts.items():
        (task.work / f"{name}.txt").write_text(part, "utf-8")
    first, second = (str(task.work / f"{name}.txt") for name in parts)
    return first, second


def load_float32(folder: Path) -> Any:
    """Return a model of transformers, ready to run."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration_windows(task: argparse.Namespace) -> Tensor:
    """Return the windows that `halve prune` draws, [samples, length]."""
    corpus = load_corpus(task.calibration, "calibration")
    encode = load_encoder(task.model)
    return draw_windows(corpus, encode, task.samples, task.seq_len, task.seed)


def rival_rows(
    task: argparse.Namespace, rival: LlamaCpp, judge: Judge, dense: Any
) -> Iterator[dict]:
    """Yield a row for each type; the dense model is changed and restored."""
    linears = block_linears(dense)
    importance = input_mean_squares(dense, linears, calibration_windows(task))
    for name in task.types:
        started = time.perf_counter()
        with quantized(rival, linears, importance, name):
            seconds = time.perf_counter() - started
            judged = judge.judge(dense)
        yield print_row(RIVAL, name, bits_per_weight(name), judged, seconds)


def block_linears(model: Any) -> dict[str, nn.Linear]:
    """Return the matrices that Halve compresses: all but the head, by their paths."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


@torch.inference_mode()
def input_mean_squares(
    model: Any, linears: dict[str, nn.Linear], windows: Tensor
) -> dict[str, Tensor]:
    """Return the mean square of each input of each matrix: llama.cpp's imatrix."""
    sums = {
        p: torch.zeros(m.in_features, dtype=torch.float64) for p, m in linears.items()
    }

    def add(path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[path] += inputs[0].double().square().sum((0, 1))

    hooks = [m.register_forward_pre_hook(partial(add, p)) for p, m in linears.items()]
    for window in windows:
        model.base_model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: (total / windows.numel()).float() for path, total in sums.items()}


@contextmanager
def quantized(
    rival: LlamaCpp,
    linears: dict[str, nn.Linear],
    importance: dict[str, Tensor],
    name: str,
) -> Iterator[None]:
    """Give matrices the values of a type of llama.cpp for a while."""
    originals = {path: linear.weight.data for path, linear in linears.items()}
    for path, linear in linears.items():
        pair = linear.weight.data.numpy(), importance[path].numpy()
        linear.weight.data = torch.from_numpy(
            rival.fake_quantize(pair[0], name, pair[1])
        )
    try:
        yield
    finally:
        for path, linear in linears.items():
            linear.weight.data = originals[path]


@dataclass(frozen=True)
class Grid:
    """A grid of Halve, and perhaps zeros, with a solver.

    Attributes:
        text: Parts in any order, with a colon between: int3, a group size, asymmetric,
            a percentage of zeros.
        solver: A key of `SOLVERS`.
    """

    text: str
    solver: str

    @property
    def name(self) -> str:
        """Name for tables and folders."""
        return f"{self.text.replace(':', ' ')} {self.solver}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of `halve.prune`."""
        chosen: dict[str, Any] = {"sparsity": 0, **SOLVERS[self.solver]}
        for part in self.text.split(":"):
            if part == "asymmetric":
                chosen["symmetric"] = False
            elif part.endswith("%"):
                chosen["sparsity"] = part
            elif part.isdigit():
                chosen["group_size"] = int(part)
            else:
                chosen["quantize"] = part
        return chosen


def halve_rows(task: argparse.Namespace, judge: Judge) -> Iterator[dict]:
    """Yield a row for each grid and solver."""
    for grid in (Grid(text, s) for s in task.solvers for text in task.grids):
        out = task.work / f"halve-{grid.name.replace(' ', '-').replace('%', '')}"
        record = halve.prune(
            task.model,
            out,
            calibration=task.calibration,
            samples=task.samples,
            seq_len=task.seq_len,
            seed=task.seed,
            **grid.options,
        )
        assert record.bits is not None
        judged = judge.judge(load_float32(out))
        yield print_row(HALVE, grid.name, record.bits, judged, record.seconds)


def print_row(
    family: str, name: str, bits: float, judged: Divergence, seconds: float = 0
) -> dict:
    """Print and return a row of the table of quality."""
    print(
        f"  {family:10}{name:30} {bits:7.4f} bits  KL {judged.kl:.4f} "
        f"± {judged.kl_error:.4f}  perplexity {judged.perplexity:8.3f}  "
        f"same first {100 * judged.agreement:5.1f} %  {seconds:5.0f} s",
        flush=True,
    )
    row = {"family": family, "name": name, "bits": bits, "seconds": seconds}
    return row | vars(judged)


# Speed.


@dataclass(frozen=True)
class Runner:
    """Something that decodes.

    Attributes:
        family: `HALVE` or `RIVAL`.
        name: Of the type or of the folder.
        bits: Bits per weight of the matrices of the blocks.
        decode: From tokens and threads to tokens per second.
    """

    family: str
    name: str
    bits: float
    decode: Any


def speed(task: argparse.Namespace, rival: LlamaCpp) -> Iterator[dict]:
    """Print and yield a row for each runner and number of threads."""
    with ExitStack() as stack:
        runners = [*halve_runners(task, stack), *rival_runners(task, rival)]
        for threads in task.threads:
            yield from timed(runners, task.tokens, threads, task.rounds)


def halve_runners(task: argparse.Namespace, stack: ExitStack) -> Iterator[Runner]:
    """Yield a random Llama packed with half of its weights, and the given folders.

    Folders of codes are run with activations of 16 bits, the default, and of 8 bits, as
    llama.cpp's are.
    """
    for folder in [random_packed(task), *task.packed]:
        matrices = halve.inspect(folder).matrices
        bits = 8 * sum(m.bytes for m in matrices)
        weights = sum(m.rows * m.columns for m in matrices)
        for activations in ACTIVATIONS if folder in task.packed else (None,):
            decoder = stack.enter_context(closing(Decoder(folder, activations)))
            name = " ".join(filter(None, [folder.name, activations]))
            yield Runner(HALVE, name, bits / weights, decoder.decode)


def random_packed(task: argparse.Namespace) -> Path:
    """Return the folder of a random Llama with 50 % zeros, packed in bfloat16."""
    out = task.work / "random-llama" / task.size / "50 % bf16"
    if not out.exists():
        dense = random_dense(task)
        halve.pack(dense, out, positive_zeros=True)
    return out


def random_dense(task: argparse.Namespace) -> Path:
    """Return the folder of a random Llama with 50 % zeros, dense."""
    folder = task.work / "random-llama" / task.size / "dense"
    if not folder.exists():
        partial_folder = folder.with_name("dense.partial")
        partial_folder.mkdir(parents=True, exist_ok=True)
        write_random_model(partial_folder, "llama", task.size, parse_pattern("50%"))
        partial_folder.rename(folder)
    return folder


def rival_runners(task: argparse.Namespace, rival: LlamaCpp) -> Iterator[Runner]:
    """Yield a random Llama of the same shape for each type of llama.cpp."""
    config = AutoConfig.from_pretrained(random_dense(task))
    for name in task.types:
        path = task.work / "random-llama" / task.size / f"{name}.gguf"
        if not path.exists():
            partial_path = path.with_suffix(".partial")
            rival.write_random_llama(partial_path, config, name)
            partial_path.rename(path)
        decode = partial(rival.decode, path)
        yield Runner(RIVAL, name, bits_per_weight(name), decode)


def timed(
    runners: list[Runner], tokens: int, threads: int, rounds: int
) -> Iterator[dict]:
    """Time all runners in turn, then print and yield a row for each.

    Ratios are taken within a round, since the machine's speed changes between rounds.
    """
    speeds = [[r.decode(tokens, threads) for r in runners] for _ in range(rounds)]
    print(f"{threads} threads, {tokens} tokens, {rounds} rounds")
    for index, runner in enumerate(runners):
        ratios = [row[index] / row[0] for row in speeds]
        row = {
            "family": runner.family,
            "name": runner.name,
            "bits": runner.bits,
            "threads": threads,
            "tokens_per_second": statistics.median(row[index] for row in speeds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        print(
            f"  {runner.family:10}{runner.name:22} {runner.bits:7.4f} bits  "
            f"{row['tokens_per_second']:7.1f} tokens/s  {row['ratio']:.2f} times "
            f"{runners[0].name} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
        yield row


PARTS = {"quality": quality, "speed": speed}


# Picture.


def panels(results: Results) -> list[Panel]:
    """Return a plot for each part, and for the speed one for each number of threads."""
    bits = "bits per weight"
    plots = []
    if rows := results.rows("quality"):
        title = "KL divergence from the dense model, nats per token"
        plots.append(Panel(title, bits, series(front(rows), "kl"), log=True))
    rows = results.rows("speed")
    for threads in sorted({row["threads"] for row in rows}):
        chosen = [row for row in rows if row["threads"] == threads]
        title = f"Tokens per second, {threads} thread{'s' * (threads > 1)}"
        plots.append(Panel(title, bits, series(chosen, "tokens_per_second")))
    return plots


def front(rows: list[dict]) -> list[dict]:
    """Return the rows of few bits that no other of their family beats.

    One row beats another if it diverges less and takes no more bits. They are rounded,
    because weights that became zero can save a thousandth of a bit.
    """
    few = [row for row in rows if row["bits"] < MAX_DRAWN_BITS]
    return [
        row
        for row in few
        if not any(
            other["family"] == row["family"]
            and round(other["bits"], 2) <= round(row["bits"], 2)
            and other["kl"] < row["kl"]
            for other in few
        )
    ]


def series(rows: list[dict], value: str) -> dict[str, list[Point]]:
    """Return the points of each family."""
    return {
        family: [
            Point(row["bits"], row[value], row["name"])
            for row in rows
            if row["family"] == family
        ]
        for family in (HALVE, RIVAL)
    }


if __name__ == "__main__":
    sys.exit(main())
