"""Numbers in a record equal a plain computation with transformers in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import halve
from halve.calibration import draw_windows, load_corpus, load_encoder
from halve.options import PruneOptions
from halve.pruning.allocate import search
from halve.records import AllocationRecord
from halve.runtime.blockwise_model import BlockwiseModel

SAMPLES, LENGTH, SEED = 32, 32, 0
BATCH = 2  # windows in a batch, so that there are several of each kind
SIZES: dict[str, Any] = {"samples": SAMPLES, "seq_len": LENGTH, "device": "cpu"}
HELD_OUT = PruneOptions(samples=SAMPLES, seq_len=LENGTH).held_out
# What float32 loses against float64, and far less than any wrong formula would.
CLOSE = 1e-4
BLOCKS: dict[str, Callable[[Any], nn.ModuleList]] = {
    "opt": lambda model: model.model.decoder.layers,
    "llama": lambda model: model.model.layers,
}
over_families = pytest.mark.parametrize("family", BLOCKS)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    defaults: Any = BlockwiseModel.__init__.__defaults__
    changed = (BATCH * LENGTH, *defaults[1:])
    monkeypatch.setattr(BlockwiseModel.__init__, "__defaults__", changed)


@pytest.fixture
def peaked(pico, tmp_path) -> Callable[[str], Path]:
    """Return the folder of a model whose predictions are far from uniform.

    KL divergences of nearly uniform predictions are nearly symmetric.
    """

    def folder(family: str) -> Path:
        source = pico(family, tie_word_embeddings=False)
        model = load(source).float()
        model.get_output_embeddings().weight.data.mul_(50)
        return save(model, source, tmp_path / "peaked")

    return folder


def near(expected: list[float]) -> Any:
    """Compare by relative differences alone."""
    return pytest.approx(expected, rel=CLOSE, abs=0)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def save(model: Any, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def windows_of(folder: Path, text: Path) -> Tensor:
    encode = load_encoder(folder)
    corpus = load_corpus(str(text), "calibration")
    return draw_windows(corpus, encode, SAMPLES, LENGTH, SEED)


@torch.no_grad()
def block_calls(model: Any, family: str, ids: Tensor) -> list[tuple[Any, Any, Tensor]]:
    """Return arguments and outputs of each block's call, for a batch of windows."""
    calls: list[tuple[Any, Any, Tensor]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, first(output)))

    blocks = BLOCKS[family](model)
    handles = [b.register_forward_hook(note, with_kwargs=True) for b in blocks]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def outputs_before_and_after(
    dense: Any, pruned: Any, family: str, ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return each dense and pruned block's outputs, on the pruned model's inputs."""
    blocks = zip(BLOCKS[family](dense), block_calls(pruned, family, ids), strict=True)
    return [(first(block(*args, **kw)), after) for block, (args, kw, after) in blocks]


def relative(dense: Tensor, pruned: Tensor) -> float:
    return float((dense - pruned).norm() / dense.norm())


def relative_by_token(dense: Tensor, pruned: Tensor) -> float:
    errors = (dense - pruned).norm(dim=-1) / dense.norm(dim=-1)
    return float(errors.square().mean().sqrt())


@over_families
@pytest.mark.parametrize("solver", ["sparsegpt", "auto"])
def test_the_error_of_a_block_is_that_of_the_first_batch(
    family, solver, pico, text, tmp_path
):
    """||Y - Y'|| / ||Y||, and the same of each token, in root mean square.

    Both outputs are of what enters the block in the pruned model.
    """
    options: dict[str, Any] = SIZES | {"calibration": str(text), "solver": solver}
    record = halve.prune(pico(family), tmp_path / "out", **options)
    dense, pruned = load(pico(family)), load(tmp_path / "out")
    ids = windows_of(pico(family), text)[:BATCH]
    pairs = outputs_before_and_after(dense, pruned, family, ids)
    expected = [relative(before, after) for before, after in pairs]
    assert [block.error for block in record.blocks] == near(expected)
    expected = [relative_by_token(before, after) for before, after in pairs]
    assert [block.token_error for block in record.blocks] == near(expected)


def tuning_error(dense: Any, pruned: Any, family: str, held_out: Tensor) -> list[float]:
    """Return the mean over tokens of ||y - y'||^2 / ||y||^2, each in its own model."""
    totals = [0.0] * len(BLOCKS[family](dense))
    batches = held_out.split(BATCH)
    for ids in batches:
        calls = [block_calls(model, family, ids) for model in (dense, pruned)]
        for index, ((_, _, before), (_, _, after)) in enumerate(
            zip(*calls, strict=True)
        ):
            totals[index] += relative_by_token(before, after) ** 2 / len(batches)
    return totals


@over_families
def test_the_errors_of_tuning_are_those_of_held_out_windows(
    family, pico, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("halve.options.prune._HELD_OUT", SAMPLES // (2 * BATCH))
    options: dict[str, Any] = SIZES | {"calibration": str(text), "solver": "auto"}
    tuned = halve.prune(
        pico(family), tmp_path / "tuned", refine=True, epochs=4, **options
    )
    halve.prune(pico(family), tmp_path / "plain", refine=False, **options)
    held_out = windows_of(pico(family), text)[-2 * BATCH :]
    dense = load(pico(family))
    after = tuning_error(dense, load(tmp_path / "tuned"), family, held_out)
    before = tuning_error(dense, load(tmp_path / "plain"), family, held_out)
    refined = [block.refined for block in tuned.blocks if block.refined]
    assert [pair[1] for pair in refined] == near(after)
    # Blocks behind the first get other inputs where it is tuned.
    assert [refined[0][0]] == near([before[0]])
    assert refined[0][1] < refined[0][0]


Trial = dict[str, Tensor]


@pytest.fixture
def searched(
    peaked, text, tmp_path, monkeypatch
) -> Callable[[str], tuple[Any, Tensor, AllocationRecord, list[Any]]]:
    """Return a function that searches and returns the model of each trial."""
    monkeypatch.setattr("halve.options.prune._HELD_OUT", SAMPLES // (2 * BATCH))
    tensors: list[Trial] = []
    real = search.prune_block

    def prune_block(model, streams, planned, options):
        if planned.index == 0:
            tensors.append({})
        pruned = real(model, streams, planned, options)
        tensors[-1].update({n: t.clone() for n, t in pruned.tensors.items()})
        return pruned

    monkeypatch.setattr(search, "prune_block", prune_block)

    def run(family: str) -> tuple[Any, Tensor, AllocationRecord, list[Any]]:
        folder = peaked(family)
        record = halve.prune(
            folder,
            tmp_path / "out",
            allocation="error",
            solver="sparsegpt",
            sparsity=0.4,
            calibration=str(text),
            **SIZES,
        )
        assert record.allocation is not None
        models = [with_tensors(folder, trial, family) for trial in tensors]
        assert len(models) == len(record.allocation.trials) >= 2
        held_out = windows_of(folder, text)[-2 * BATCH :]
        return load(folder), held_out, record.allocation, models

    return run


def with_tensors(folder: Path, tensors: Trial, family: str) -> Any:
    model = load(folder)
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model


@torch.no_grad()
def divergence(p: Any, q: Any, ids: Tensor) -> float:
    """Return the mean of KL(p || q) of a token, in nats."""
    logs = [m(ids, use_cache=False).logits.log_softmax(-1) for m in (p, q)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@over_families
def test_trials_report_the_error_of_blocks_and_the_divergence(family, searched):
    """Of held-out windows only; the errors are those of the uniform trial."""
    dense, held_out, allocation, models = searched(family)
    pairs = outputs_before_and_after(dense, models[0], family, held_out)
    expected = [relative(before, after) for before, after in pairs]
    assert allocation.errors == near(expected)
    found = [trial.divergence for trial in allocation.trials]
    forward = [divergence(dense, model, held_out) for model in models]
    backward = [divergence(model, dense, held_out) for model in models]
    assert found == near(forward)
    # Or the direction would not be tested.
    ratios = [one / other for one, other in zip(forward, backward, strict=True)]
    assert max(abs(ratio - 1) for ratio in ratios) > 10 * CLOSE
