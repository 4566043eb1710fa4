"""Options of a benchmark."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypedDict

from halve.errors import HalveError
from halve.option import MEASUREMENT, MODEL, Option, Options, check_ranges, documented
from halve.options.choices import ACTIVATION_CHOICES, QUANTIZE_CHOICES
from halve.options.shared import Device, TrustRemoteCode, check_device


@documented
@dataclass(frozen=True)
class BenchOptions(Options):
    """Options of a benchmark."""

    random_llama: Annotated[
        str | None,
        Option(
            "Generate a random Llama of this size instead: 110m, 1.2b, 7b or 8b.",
            MODEL,
            metavar="SIZE",
        ),
    ] = None
    random_opt: Annotated[
        str | None,
        Option(
            "Generate a random OPT of this size instead: 125m, 1.3b or 6.7b.",
            MODEL,
            metavar="SIZE",
        ),
    ] = None
    sparsity: Annotated[
        str | float, Option("Sparsity of the random model: 50%, 0.5 or 2:4.", MODEL)
    ] = "50%"
    quantize: Annotated[
        str | None,
        Option(
            "Grid of the random model's weights, rounded to nearest.",
            MODEL,
            choices=QUANTIZE_CHOICES,
            unset="no quantization",
        ),
    ] = None
    activations: Annotated[
        str,
        Option(
            "int8 times packed codes with 8-bit inputs as well.",
            MEASUREMENT,
            choices=ACTIVATION_CHOICES,
        ),
    ] = "int16"
    prompt: Annotated[
        int | None,
        Option(
            "Tokens of the prompt; 0 skips the test.",
            MEASUREMENT,
            unit="tokens",
            unset="512, or the model's maximum",
            minimum=0,
            flags=("--pp",),
        ),
    ] = None
    generated: Annotated[
        int | None,
        Option(
            "Tokens to generate; 0 skips the test.",
            MEASUREMENT,
            unit="tokens",
            unset="128, or the model's maximum",
            minimum=0,
            flags=("--tg",),
        ),
    ] = None
    batches: Annotated[
        tuple[int, ...],
        Option(
            "Sequences to decode at a time; may be repeated.",
            MEASUREMENT,
            minimum=1,
            flags=("--batch",),
        ),
    ] = (1, 4, 16)
    rounds: Annotated[
        int,
        Option("Number of repetitions.", MEASUREMENT, minimum=1),
    ] = 5
    threads: Annotated[
        int | None,
        Option(
            "Number of threads.",
            MEASUREMENT,
            unset="torch's own setting",
            minimum=1,
            maximum=4 * (os.cpu_count() or 1),
        ),
    ] = None
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    progress: Callable[[str], None] = lambda step: None

    def check(self) -> None:
        """Raise HalveError on the first option that is invalid."""
        check_device(self.device)
        check_ranges(self)
        if self.activations not in ACTIVATION_CHOICES:
            raise HalveError(
                f"There is no {self.activations!r} for activations.",
                f"Choose one of {', '.join(ACTIVATION_CHOICES)} (--activations).",
            )

    def names_one_model(self, model: str | os.PathLike[str] | None) -> bool:
        """Return whether exactly one model, given or random, is named."""
        named = (model, self.random_llama, self.random_opt)
        return sum(name is not None for name in named) == 1


class BenchKeywords(TypedDict, total=False):
    """The fields of `BenchOptions` as keywords."""

    random_llama: str | None
    random_opt: str | None
    sparsity: str | float
    quantize: str | None
    activations: str
    prompt: int | None
    generated: int | None
    batches: tuple[int, ...]
    rounds: int
    threads: int | None
    device: str
    trust_remote_code: bool
    progress: Callable[[str], None]
