"""Options of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypedDict

from halve.option import TEXT, Option, check_ranges, documented
from halve.options.shared import (
    LENGTH,
    ActivationMemory,
    Device,
    TrustRemoteCode,
    check_device,
)

if TYPE_CHECKING:
    from halve.records import Progress


@documented
@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation."""

    data: Annotated[
        str,
        Option(
            "Text to evaluate on: wikitext2, ptb, c4, stdlib, a Hub data set, or a "
            ".txt, .jsonl or .parquet file.",
            TEXT,
            details="wikitext2 (joined by blank lines) and ptb are the test splits; c4 "
            "is the first 1100 documents of the validation split, 256 segments; stdlib "
            "is the modules of this Python's library that calibration does not use.",
        ),
    ] = "wikitext2"
    seq_len: Annotated[
        int | None,
        Option("Length of a segment.", TEXT, unit="tokens", unset=LENGTH),
    ] = None
    segments: Annotated[
        int | None,
        Option(
            "Maximum number of segments, from the beginning of the text.",
            TEXT,
            unset="all",
            minimum=1,
        ),
    ] = None
    device: Device = "auto"
    activation_memory: ActivationMemory = None
    trust_remote_code: TrustRemoteCode = False
    progress: "Callable[[Progress], None]" = lambda progress: None

    def check(self) -> None:
        """Raise HalveError on the first option that is invalid."""
        check_device(self.device)
        check_ranges(self)


class EvalKeywords(TypedDict, total=False):
    """The fields of `EvalOptions` as keywords."""

    data: str
    seq_len: int | None
    segments: int | None
    device: str
    activation_memory: int | None
    trust_remote_code: bool
    progress: "Callable[[Progress], None]"
