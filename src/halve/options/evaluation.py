"""Options of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypedDict

from halve.option import TEXT, Option, Options, check_choice, check_ranges, documented
from halve.options.choices import BOS_CHOICES
from halve.options.shared import (
    BOS_DETAILS,
    LENGTH,
    ActivationMemory,
    Device,
    TrustRemoteCode,
    check_device,
)
from halve.text_name import parse_text_name

if TYPE_CHECKING:
    from halve.records import Progress


@documented
@dataclass(frozen=True)
class EvalOptions(Options):
    """Options of an evaluation."""

    data: Annotated[
        str,
        Option(
            "Text to evaluate on: wikitext2, ptb, c4, stdlib, a data set, or a .txt, "
            ".jsonl or .parquet file.",
            TEXT,
            details="Data sets and columns are named as for calibration; the split is "
            "test by default. wikitext2 (joined by blank lines) and ptb are the test "
            "splits; c4 is the first 1100 documents of the validation split, 256 "
            "segments; stdlib is the modules of this Python's library that calibration "
            "does not use.",
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
    bos: Annotated[
        str,
        Option(
            "Whether every segment is read after the tokenizer's BOS token.",
            TEXT,
            choices=BOS_CHOICES,
            details=f"{BOS_DETAILS} The same tokens are predicted either way.",
        ),
    ] = "auto"
    device: Device = "auto"
    activation_memory: ActivationMemory = None
    trust_remote_code: TrustRemoteCode = False
    progress: "Callable[[Progress], None]" = lambda progress: None

    def check(self) -> None:
        """Raise HalveError on the first option that is invalid."""
        check_device(self.device)
        check_ranges(self)
        check_choice(self, "bos")
        parse_text_name(self.data)


class EvalKeywords(TypedDict, total=False):
    """The fields of `EvalOptions` as keywords."""

    data: str
    seq_len: int | None
    segments: int | None
    bos: str
    device: str
    activation_memory: int | None
    trust_remote_code: bool
    progress: "Callable[[Progress], None]"
