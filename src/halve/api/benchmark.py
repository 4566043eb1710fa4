"""Time a model, or a random one, dense and packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Unpack

import torch

from halve.api.keywords import takes, with_keywords
from halve.checkpoint import Checkpoint, resolve_model
from halve.devices import choose_device
from halve.errors import HalveError
from halve.measure import BenchModels, run_bench, write_random_model
from halve.options import (
    BenchKeywords,
    BenchOptions,
    PackOptions,
    PruneOptions,
    RunOptions,
)
from halve.packing import pack_model, unpack_model
from halve.patterns import parse_pattern
from halve.pruning import prune_model
from halve.records import BenchRecord


@takes(BenchOptions)
def bench(
    model: str | Path | None = None,
    *,
    options: BenchOptions | None = None,
    **keywords: Unpack[BenchKeywords],
) -> BenchRecord:
    """Time a model dense in torch, dense in Halve's kernel, and packed.

    The rounds of the backends are interleaved, so that a change in the machine's speed
    affects all of them. On a GPU there are two: Halve has no kernel for dense weights
    there. The counterpart of the model, packed or dense, is written
    to a temporary folder.

    Args:
        model: A pruned model, dense or packed: a folder or a name on the Hub. None with
            `random_llama` or `random_opt`.
        options: What to measure; by default `BenchOptions()`.
        **keywords: Fields of `BenchOptions`, which override those of the object.

    Returns:
        Tokens per second of every backend in every test, the bytes of weights that a
        token reads, the memory bandwidth of the machine or of its GPU, and the peak
        memory of loading and running the model dense and packed.

    Raises:
        HalveError: Not exactly one model is named, or any other error that you can fix.

    Cost:
        Memory for the model dense and packed at once; disk for the counterpart.
    """
    merged = with_keywords(options or BenchOptions(), keywords)
    merged.check()
    with (
        _threads(merged.threads),
        _model(model, merged) as (name, source),
        _counterparts(source, merged) as (dense, packed),
    ):
        return run_bench(BenchModels(name, dense, packed), merged)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _model(
    model: str | Path | None, options: BenchOptions
) -> Iterator[tuple[str, Path]]:
    """Yield the name and folder of the model to time, a random one if requested."""
    if not options.names_one_model(model):
        raise HalveError(
            "Not exactly one model is named.",
            "Name a model, or set one of random_llama and random_opt (--random-llama, "
            "--random-opt).",
        )
    if model is not None:
        if options.quantize is not None:
            raise HalveError(
                f"{model} is timed as it is, and cannot be quantized for that.",
                "Omit quantize (--quantize), or time a random model.",
            )
        yield str(model), resolve_model(model)
        return
    with _random_model(options) as named:
        yield named


@contextmanager
def _random_model(options: BenchOptions) -> Iterator[tuple[str, Path]]:
    """Yield the name and folder of a random model, which is temporary."""
    sizes = {"llama": options.random_llama, "opt": options.random_opt}
    [(family, size)] = [
        (name, size) for name, size in sizes.items() if size is not None
    ]
    pattern = parse_pattern(options.sparsity, allow_dense=options.quantize is not None)
    with TemporaryDirectory(prefix="halve-bench-") as folder:
        source = Path(folder) / "random"
        source.mkdir()
        options.progress(f"generating a random {family} {size}")
        device = str(choose_device(options.device))
        write_random_model(source, family, size, pattern, device=device)
        name = f"random {family} {size}, {options.sparsity} zeros"
        if options.quantize is None:
            yield name, source
            return
        options.progress("quantizing it")
        quantized = PruneOptions(
            sparsity=options.sparsity,
            solver="magnitude",
            quantize=options.quantize,
            packed=True,
        )
        prune_model(source, Path(folder) / "quantized", quantized, RunOptions())
        rmtree(source)
        yield f"{name}, {options.quantize}", Path(folder) / "quantized"


@contextmanager
def _counterparts(source: Path, options: BenchOptions) -> Iterator[tuple[Path, Path]]:
    """Yield a model dense and packed; the one that is missing is temporary."""
    with TemporaryDirectory(prefix="halve-bench-") as folder:
        other = Path(folder) / "model"
        if Checkpoint.open(source).is_packed:
            options.progress("unpacking")
            unpack_model(source, other, PackOptions(False, options.trust_remote_code))
            yield other, source
        else:
            options.progress("packing")
            # Positive zeros take fewer bytes, and give the same products.
            pack_model(source, other, PackOptions(True, options.trust_remote_code))
            yield source, other
