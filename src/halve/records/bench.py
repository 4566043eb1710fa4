"""What `halve bench` measures."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Memory of a process that loads and runs a model, in bytes.

    The first three are peaks of resident memory of the host.

    Attributes:
        interpreter: With torch and transformers imported, before anything is loaded.
        loaded: After loading a model.
        run: After generating with it.
        gpu_loaded: Bytes of a GPU's memory in tensors once the model is loaded: its
            weights. 0 on the CPU.
        gpu_peak: Peak of these bytes while it is loaded and run. 0 on the CPU.
    """

    interpreter: int
    loaded: int
    run: int
    gpu_loaded: int = 0
    gpu_peak: int = 0


@dataclass(frozen=True)
class SpeedRecord:
    """The speed of one backend in one test.

    Attributes:
        backend: Name of the implementation of the matrix products.
        test: Name of the test: `pp512` (prompt processing), `tg128` (text generation),
            `tg128 x4` (four sequences at once) ...
        batch: Number of sequences at once.
        tokens: Number of tokens processed or generated in each round.
        seconds: Duration of each round.
        weight_bytes: Bytes of weights that one decode step reads.
        decoding: What runs a model's blocks: `transformers`, whose code calls the
            products; `halve`, a decode step in one call of the kernels; or `cuda
            graph`, in which that code was captured.
    """

    backend: str
    test: str
    batch: int
    tokens: int
    seconds: tuple[float, ...]
    weight_bytes: int
    decoding: str = "transformers"

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def median(self) -> float:
        """Median over rounds of the tokens per second."""
        return statistics.median(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation over rounds of the tokens per second; 0 for one round."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0

    @property
    def mean(self) -> float:
        """Mean over rounds of the tokens per second."""
        return statistics.fmean(self.rates)

    @property
    def bandwidth(self) -> float:
        """Bytes of weights read per second; meaningful for decoding only."""
        return self.weight_bytes * self.median / self.batch


@dataclass(frozen=True)
class BenchRecord:
    """The speed and memory of a model on one machine.

    Attributes:
        model: Name of the model.
        parameters: Number of elements in all tensors.
        sizes: Backend -> size of all tensors in the files that it loads, in bytes.
        cpu: Name of the processor, as the machine reports it.
        threads: Number of threads of torch and of the kernels.
        kernel: Name of the sparse kernel in use; `torch` where there is none.
        bandwidth: Best measured memory bandwidth, in bytes per second: on the CPU of
            all threads together, reading; on a GPU copying, with reads and writes
            counted.
        results: One record for each backend and test.
        footprints: `dense` and `packed` -> peak memory of a process that runs the
            model.
        gpu: Name of the GPU that the model ran on; empty for the CPU.
    """

    model: str
    parameters: int
    sizes: dict[str, int]
    cpu: str
    threads: int
    kernel: str
    bandwidth: float
    results: tuple[SpeedRecord, ...]
    footprints: dict[str, Footprint]
    gpu: str = ""
