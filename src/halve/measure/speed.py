"""How fast a model runs: dense in torch, dense in Halve's kernel, and packed.

The backends share one model and differ only in the layers of the prunable matrices and
the output head. Their rounds are interleaved, because the memory bandwidth of a machine
changes from minute to minute. On a GPU there are two: Halve has no kernel for dense
weights there.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import HalveError
from halve.measure.gpu_speed import time_decoding, time_prefill
from halve.options import BenchOptions
from halve.records import SpeedRecord
from halve.runtime import decode
from halve.runtime.cpu.dense_linear import DenseLinear, plain_linear
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.packed_linear import PackedLinear
from halve.runtime.cpu.quantized_linear import set_activations
from halve.runtime.cpu.replace_modules import packed_layers
from halve.runtime.cuda.clock import gpu_seconds
from halve.runtime.generation import load

TORCH, HALVE_DENSE, PACKED = "torch", "halve dense", "halve packed"
# The same with 8-bit activations, which change the results.
PACKED_INT8 = "halve packed, int8 activations"
# Much larger than any cache.
_READ_BYTES = 2**29
_READ_TIMES = 7
_ON_CPU = BenchOptions(device="cpu")


@dataclass(frozen=True)
class BenchCase:
    """A measurement: the prefill of a prompt, or the decoding of tokens after one.

    Attributes:
        name: Name as in llama-bench: `pp512`, `tg128`; `tg128 x4` for a batch of 4.
        prompt: Tokens of the prompt.
        generated: Tokens decoded after it, which are timed; 0 to time the prefill.
        batch: Sequences in the batch.
    """

    name: str
    prompt: int
    generated: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens processed in the timed part."""
        return self.batch * (self.generated or self.prompt)


def bench_cases(
    prompt: int, generated: int, batches: tuple[int, ...]
) -> list[BenchCase]:
    """Return a prefill of one sequence, and a decode for each batch size.

    Args:
        prompt: Tokens of the prefill; 0 for none.
        generated: Tokens of each decode; 0 for none.
        batches: Batch sizes of the decodes.
    """
    prefill = [BenchCase(f"pp{prompt}", prompt, 0, 1)] if prompt else []
    names = {batch: f"tg{generated}" + f" x{batch}" * (batch > 1) for batch in batches}
    decode = [BenchCase(name, 1, generated, batch) for batch, name in names.items()]
    return prefill + (decode if generated else [])


class Backends:
    """One model with several sets of layers for the same matrices.

    Attributes:
        model: A packed transformers model, as `halve.load` returns it.
        layers: Backend -> path of the module -> layer.
    """

    def __init__(self, model: Any, int8: bool = False) -> None:  # noqa: ANN401
        self.model = model
        names = (TORCH, HALVE_DENSE, PACKED)
        if on_gpu(model):
            _check_gpu(model, int8)
            names = (TORCH, PACKED)
        self.layers: dict[str, dict[str, nn.Module]] = {name: {} for name in names}
        if int8:
            set_activations(model, "int8")  # raises if it has no packed codes
            self.layers[PACKED_INT8] = self.layers[PACKED]
        for path, packed in list(packed_layers(model)):
            self._add(path, _dense(packed), packed)
        # Such as the head. On a GPU there is no kernel for it, so it stays torch's own.
        dense = nn.Linear if on_gpu(model) else DenseLinear
        for path, module in list(model.named_modules()):
            if isinstance(module, dense):
                self._add(path, module, module)

    def _add(self, path: str, dense: nn.Linear, packed: nn.Module) -> None:
        made = {TORCH: plain_linear(dense), HALVE_DENSE: dense, PACKED: packed}
        for backend, layers in self.layers.items():
            if backend in made:
                layers[path] = made[backend]

    def install(self, backend: str) -> None:
        """Put the layers of a backend into the model."""
        for path, layer in self.layers[backend].items():
            self.model.set_submodule(path, layer)
        set_activations(self.model, "int8" if backend == PACKED_INT8 else "int16")

    def weight_bytes(self, backend: str) -> int:
        """Return the bytes of weights that are read to decode one token."""
        return sum(
            tensor.nbytes
            for layer in self.layers[backend].values()
            for tensor in (*layer.parameters(), *layer.buffers())
        )


def on_gpu(model: Any) -> bool:  # noqa: ANN401
    """Whether a model is timed as one on a GPU."""
    return model.device.type == "cuda"


def _check_gpu(model: Any, int8: bool) -> None:  # noqa: ANN401
    """Raise HalveError if there is nothing to compare on a GPU."""
    if int8:
        raise HalveError(
            "8-bit activations are for Halve's kernels on the CPU.",
            "Omit activations (--activations), or pass --device cpu.",
        )
    if not any(True for _ in packed_layers(model)):
        raise HalveError(
            "Packed matrices are unpacked on this GPU, so packed and dense models are "
            "the same there.",
            "Install triton, without which there are no kernels for GPUs, or pass "
            "--device cpu.",
        )


def _dense(packed: PackedLinear) -> DenseLinear:
    layer = DenseLinear(1, 1, bias=False)
    layer.in_features, layer.out_features = packed.in_features, packed.out_features
    layer.weight = nn.Parameter(packed.dense_weight(), requires_grad=False)
    layer.register_parameter("bias", packed.bias)
    return layer


def measure_speed(
    folder: Path,
    cases: Sequence[BenchCase],
    rounds: int,
    options: BenchOptions = _ON_CPU,
) -> list[SpeedRecord]:
    """Time a packed model against the same model dense.

    Args:
        folder: Folder of a packed model.
        cases: What to time.
        rounds: Number of repetitions, after one that is not counted.
        options: Device, activations, trust and progress; the rest is not read.

    Returns:
        A record for each backend and case.

    Raises:
        HalveError: Packed and dense do not differ on this GPU, or 8-bit activations
            are to be timed on it.
    """
    model = load(folder, options.device, options.trust_remote_code)
    decode.prepare(model)
    backends = Backends(model, options.activations == "int8")
    times: dict[tuple[str, BenchCase, str], list[float]] = {}
    for number in range(rounds + 1):
        options.progress(f"round {number} of {rounds}" if number else "warming up")
        for backend, case in _pairs(backends, cases):
            backends.install(backend)
            seconds, decoding = _time(backends.model, case)
            if number:
                times.setdefault((backend, case, decoding), []).append(seconds)
    return [
        SpeedRecord(
            backend=backend,
            test=case.name,
            batch=case.batch,
            tokens=case.tokens,
            seconds=tuple(seconds),
            weight_bytes=backends.weight_bytes(backend),
            decoding=decoding,
        )
        for (backend, case, decoding), seconds in times.items()
    ]


def _pairs(
    backends: Backends, cases: Sequence[BenchCase]
) -> Iterator[tuple[str, BenchCase]]:
    return ((backend, case) for case in cases for backend in backends.layers)


@torch.inference_mode()
def _time(model: Any, case: BenchCase) -> tuple[float, str]:  # noqa: ANN401
    """Return the seconds that a case takes, and what decoded.

    Tokenization and sampling are not included.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (case.batch, case.prompt), generator=generator)
    if on_gpu(model):
        return _time_on_gpu(model, case, prompt.to(model.device))
    cache = decode.new_cache(model)
    read = partial(model, prompt, past_key_values=cache, use_cache=True)
    if not case.generated:
        return _seconds(lambda: read(logits_to_keep=1)), "transformers"
    state = read()
    seconds = _seconds(lambda: _decode(model, state, case.generated))
    return seconds, "halve" if decode.by_step(cache) else "transformers"


def _time_on_gpu(
    model: Any,  # noqa: ANN401
    case: BenchCase,
    prompt: Tensor,
) -> tuple[float, str]:
    clock = partial(gpu_seconds, device=model.device)
    if not case.generated:
        return time_prefill(model, prompt, clock), "transformers"
    return time_decoding(model, prompt, case.generated, clock)


def _decode(model: Any, state: Any, count: int) -> None:  # noqa: ANN401
    """Decode tokens greedily, from the outputs of a prefill."""
    for _ in range(count):
        next_ids: Tensor = state.logits[:, -1:].argmax(-1)
        state = model(next_ids, past_key_values=state.past_key_values, use_cache=True)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Return the memory bandwidth of all threads, reading, in bytes per second.

    The best of several runs.
    """
    loaded = kernels()
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    read = (lambda: loaded.read(memory)) if loaded else memory.sum
    return _READ_BYTES / min(_seconds(read) for _ in range(_READ_TIMES))
