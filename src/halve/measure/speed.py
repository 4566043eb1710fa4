"""How fast a model runs: dense in torch, dense in Halve's kernel, and packed.

The three share one model and differ only in what multiplies by the prunable matrices
and the head, so that nothing else can make a difference. They run in rounds, one after
the other in each, since a machine's memory bandwidth changes from minute to minute.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halve.records import SpeedRecord
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.layers import DenseLinear, SparseLinear, plain_linear
from halve.runtime.cpu.replace_modules import sparse_layers
from halve.runtime.generation import load

TORCH, HALVE_DENSE, PACKED = "torch", "halve dense", "halve packed"
# Far more than a cache holds.
_READ_BYTES = 2**29
_READ_TIMES = 7


@dataclass(frozen=True)
class BenchCase:
    """One thing to time.

    Attributes:
        name: As llama-bench names it: `pp512`, `tg128`; `tg128 x4` for a batch of 4.
        prompt: Tokens of the prompt.
        generated: Tokens generated after it; 0 where the prompt itself is timed.
        batch: Sequences at once.
    """

    name: str
    prompt: int
    generated: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens that the time is divided by."""
        return self.batch * (self.generated or self.prompt)


def bench_cases(
    prompt: int, generated: int, batches: tuple[int, ...]
) -> list[BenchCase]:
    """Return a prefill of one sequence and a decode for each batch."""
    prefill = [BenchCase(f"pp{prompt}", prompt, 0, 1)] if prompt else []
    names = {batch: f"tg{generated}" + f" x{batch}" * (batch > 1) for batch in batches}
    decode = [BenchCase(name, 1, generated, batch) for batch, name in names.items()]
    return prefill + (decode if generated else [])


class Backends:
    """One model with three sets of layers for the same matrices.

    Attributes:
        model: Of transformers.
        layers: Backend -> path -> layer.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model = model
        self.layers: dict[str, dict[str, nn.Module]] = {
            TORCH: {},
            HALVE_DENSE: {},
            PACKED: {},
        }
        for path, sparse in list(sparse_layers(model)):
            self._add(path, _dense(sparse), sparse)
        for path, module in list(model.named_modules()):
            if isinstance(module, DenseLinear):
                self._add(path, module, module)

    def _add(self, path: str, dense: DenseLinear, packed: nn.Module) -> None:
        self.layers[TORCH][path] = plain_linear(dense)
        self.layers[HALVE_DENSE][path] = dense
        self.layers[PACKED][path] = packed

    def install(self, backend: str) -> None:
        """Let a backend do the products."""
        for path, layer in self.layers[backend].items():
            self.model.set_submodule(path, layer)

    def weight_bytes(self, backend: str) -> int:
        """Return the bytes of weights that one decoded token reads."""
        return sum(
            tensor.nbytes
            for layer in self.layers[backend].values()
            for tensor in (*layer.parameters(), *layer.buffers())
        )


def _dense(sparse: SparseLinear) -> DenseLinear:
    weight = sparse.packed.unpack()
    weight = weight.T.contiguous() if sparse.transposed else weight
    layer = DenseLinear(1, 1, bias=False)
    layer.in_features, layer.out_features = sparse.in_features, sparse.out_features
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", sparse.bias)
    return layer


def measure_speed(
    folder: Path,
    plan: Sequence[BenchCase],
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
    trust_remote_code: bool = False,
) -> list[SpeedRecord]:
    """Time a packed model against itself dense.

    Args:
        folder: Of a packed model.
        plan: What to time.
        rounds: How often; one more warms up.
        progress: Told of each round.
        trust_remote_code: Whether Python code that comes with the model may run.

    Returns:
        A record for each backend and test.
    """
    contenders = Backends(load(folder, "cpu", trust_remote_code))
    seconds: dict[tuple[str, BenchCase], list[float]] = {}
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        for backend, test in _pairs(contenders, plan):
            contenders.install(backend)
            taken = _time(contenders.model, test)
            if number:
                seconds.setdefault((backend, test), []).append(taken)
    return [
        SpeedRecord(
            backend=backend,
            test=test.name,
            batch=test.batch,
            tokens=test.tokens,
            seconds=tuple(taken),
            weight_bytes=contenders.weight_bytes(backend),
        )
        for (backend, test), taken in seconds.items()
    ]


def _pairs(
    contenders: Backends, plan: Sequence[BenchCase]
) -> Iterator[tuple[str, BenchCase]]:
    return ((backend, test) for test in plan for backend in contenders.layers)


@torch.inference_mode()
def _time(model: Any, test: BenchCase) -> float:  # noqa: ANN401
    """Return the seconds that a test takes; sampling and tokenising are not in it."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (test.batch, test.prompt), generator=generator)
    if not test.generated:
        return _clocked(lambda: model(prompt, use_cache=True, logits_to_keep=1))
    state = model(prompt, use_cache=True)
    return _clocked(lambda: _decode(model, state, test.generated))


def _decode(model: Any, state: Any, count: int) -> None:  # noqa: ANN401
    for _ in range(count):
        likeliest: Tensor = state.logits[:, -1:].argmax(-1)
        state = model(likeliest, past_key_values=state.past_key_values, use_cache=True)


def _clocked(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Return how many bytes a second all threads can read from memory, at best."""
    found = kernels()
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    read = (lambda: found.read(memory)) if found else memory.sum
    return _READ_BYTES / min(_clocked(read) for _ in range(_READ_TIMES))
