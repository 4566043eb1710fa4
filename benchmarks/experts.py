"""Question: how are the experts of a mixture best pruned?

Prunes a mixture of experts, such as `tools/train_small_model.py --experts 8` trains,
and compares each result with the dense model on held-out text, by the KL divergence of
its predictions and by perplexity; means over draws of the calibration windows, and the
range of the divergence. The parts:

- `solvers`: every solver at 50 % and 2:4.
- `statistics`: what an expert is fitted to: its own tokens (routed only), those of the
  whole block (all tokens), or both as in every run (shrunk); and these with rows that
  are weighed by the router's weight g, of the last matrix of an expert or of all. With
  few windows too, where few tokens reach an expert.
- `dropped`: half of the experts dropped whole, and nothing else: the better of all
  scores in each block, as in every run; REAP; mean norm; and at random, each draw of
  the windows with other experts. With the rest pruned by sparsegpt at 50 % as well.

There is no claim to fail: prints the results.

    python benchmarks/experts.py MODEL [--parts solvers statistics dropped]
        [--seeds 3] [--patterns 50% 2:4] [--segments 128] [--samples 128]
        [--few-samples 8] [--calibration TEXT --data TEXT] [--work FOLDER]

Each run is added to WORK/experts.json, and runs that are there are not repeated.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from divergence import Divergence, Judge, cut_text
from machine import describe_machine
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import halve
from halve.pruning.observe import expert_statistics
from halve.pruning.observe.expert_outputs import ExpertSums
from halve.pruning.observe.expert_statistics import Weighting
from halve.pruning.select.experts import SALIENCIES, Saliency

# Name -> options of halve.prune.
SOLVERS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "sparsegpt": {"solver": "sparsegpt"},
    "auto": {"solver": "auto"},
    "auto --refine": {"solver": "auto", "refine": True},
}
# So many tokens of the block's mean that an expert's own are nothing beside them.
_ALL = 1e6
# Name -> what the statistics of an expert are made of; the first is that of every run.
STATISTICS = {
    "shrunk": Weighting(),
    "shrunk, one token a column": Weighting(1, 1),
    "routed only": Weighting(0, 0),
    "all tokens": Weighting(_ALL, _ALL),
    "shrunk, last by g": Weighting(last=True),
    "shrunk, all by g": Weighting(first=True, last=True),
    "routed only, all by g": Weighting(0, 0, first=True, last=True),
}


def at_random(sums: ExpertSums) -> Tensor:
    """Return scores that say nothing; others for other calibration windows."""
    generator = torch.Generator().manual_seed(int(sums.norms.sum() * 1e6))
    return torch.rand(len(sums.tokens), generator=generator, dtype=torch.float64)


# Name -> scores of experts, of which each block takes the best; the first is that of
# every run.
SCORES: dict[str, dict[str, Saliency]] = {
    "best of both": dict(SALIENCIES),
    **{name: {name: score} for name, score in SALIENCIES.items()},
    "random": {"random": at_random},
}
# What follows dropping -> options of halve.prune.
AFTERWARDS = {
    "": {"sparsity": 0},
    ", then sparsegpt 50%": {"sparsity": "50%", "solver": "sparsegpt"},
}
# Solvers with which statistics are compared.
_COMPARED = ("sparsegpt", "auto")


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Attributes:
        part: Table that it belongs to.
        title: What its row is called.
        options: Options of halve.prune.
        statistic: Name in `STATISTICS`.
        scores: Name in `SCORES`.
    """

    part: str
    title: str
    options: dict[str, Any]
    statistic: str = "shrunk"
    scores: str = "best of both"

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Set what is no option of Halve, for a while."""
        weighting = STATISTICS[self.statistic]
        with (
            mock.patch.object(expert_statistics, "WEIGHTING", weighting),
            mock.patch.dict(SALIENCIES, SCORES[self.scores], clear=True),
        ):
            yield


@dataclass
class Bench:
    """Prunes and judges; remembers what was judged.

    Attributes:
        task: The command line.
        known: Key of a run -> its divergence.
    """

    task: argparse.Namespace
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task.work.mkdir(parents=True, exist_ok=True)
        self._file = self.task.work / "experts.json"
        if self._file.exists():
            self.known = json.loads(self._file.read_text())

    @cached_property
    def judge(self) -> Judge:
        """Compares models with the dense one on the first segments of the text."""
        task = self.task
        length = _length(task.model)
        segments = cut_text(task.model, task.data, length, task.segments)
        return Judge(_loaded(task.model), segments)

    def row(self, run: Run) -> None:
        """Print a row: means over the draws of the calibration windows."""
        found = [self._judged(run, seed) for seed in range(self.task.seeds)]
        kl = [one.kl for one in found]
        mean = {n: statistics.fmean(asdict(one)[n] for one in found) for n in _SHOWN}
        print(
            f"  {run.title:50}  {mean['kl']:.4f} ({min(kl):.4f} to {max(kl):.4f}; "
            f"+/- {mean['kl_error']:.4f})  {mean['perplexity']:8.3f}  "
            f"{100 * mean['agreement']:.1f} %",
            flush=True,
        )

    def _judged(self, run: Run, seed: int) -> Divergence:
        """Return the divergence of a run, which is known or is done now."""
        task, options = self.task, {"samples": self.task.samples} | run.options
        sizes = (str(task.model), task.calibration, task.data, task.segments)
        key = json.dumps([*sizes, options, run.statistic, run.scores, seed])
        if key not in self.known:
            with tempfile.TemporaryDirectory(dir=task.work) as folder, run.patched():
                out = Path(folder) / "out"
                text = {"calibration": task.calibration, "seed": seed}
                halve.prune(task.model, out, **text, **options)
                self.known[key] = asdict(self.judge.judge(_loaded(out)))
            written = self._file.with_suffix(".new")
            written.write_text(json.dumps(self.known, indent=1) + "\n")
            written.replace(self._file)
        return Divergence(**self.known[key])


_SHOWN = ("kl", "kl_error", "perplexity", "agreement")


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _length(folder: Path) -> int:
    """Return the length of a segment: the usual one, or the longest of the model."""
    config = json.loads((folder / "config.json").read_text())
    return min(2048, config.get("max_position_embeddings", 2048))


def solver_runs(task: argparse.Namespace) -> Iterator[Run]:
    """Yield every solver at every pattern."""
    for pattern in task.patterns:
        for name, options in SOLVERS.items():
            title = f"{pattern}, {name}"
            yield Run("solvers", title, {"sparsity": pattern, **options})


def statistic_runs(task: argparse.Namespace) -> Iterator[Run]:
    """Yield every kind of statistic, with many windows and with few."""
    for samples in (task.samples, task.few_samples):
        for pattern in task.patterns:
            for solver in _COMPARED:
                for name in STATISTICS:
                    options = {"sparsity": pattern, "samples": samples}
                    title = f"{samples} windows, {pattern}, {solver}, {name}"
                    yield Run("statistics", title, options | SOLVERS[solver], name)


def dropping_runs(task: argparse.Namespace) -> Iterator[Run]:
    """Yield every score by which half of the experts are dropped."""
    for afterwards, options in AFTERWARDS.items():
        for name in SCORES:
            every = {"experts": "50%", "samples": task.samples} | options
            yield Run("dropped", f"{name}{afterwards}", every, scores=name)


PARTS = {
    "solvers": solver_runs,
    "statistics": statistic_runs,
    "dropped": dropping_runs,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--segments", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--few-samples", type=int, default=8)
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--work", type=Path, default=Path("build/experts"))
    return parser.parse_args()


def main() -> int:
    """Print the tables."""
    task = _arguments()
    disable_progress_bar()
    print(describe_machine(), f"halve {halve.__version__}", sep="\n", flush=True)
    bench = Bench(task)
    for part in task.parts:
        print(f"\n{part}: KL (range; its error), perplexity, agreement")
        dense = bench.judge.dense
        print(f"  {'dense':50}  {0:.4f}{'':33}{dense.perplexity:8.3f}")
        for run in PARTS[part](task):
            bench.row(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
