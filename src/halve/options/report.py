"""Options of a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypedDict

from halve.errors import HalveError
from halve.option import (
    MEASUREMENT,
    OUTPUT,
    TEXT,
    Option,
    Options,
    check_ranges,
    documented,
)
from halve.options.shared import Device, TrustRemoteCode, check_device
from halve.text_name import parse_text_name


@documented
@dataclass(frozen=True)
class ReportOptions(Options):
    """Options of a report."""

    measure: Annotated[
        bool,
        Option(
            "Measure first what the page shows, and keep it in OUT/measurements.json.",
            MEASUREMENT,
            details="Divergence from the dense model, a passage that both read, texts "
            "that both continue, and speed.",
        ),
    ] = False
    against: Annotated[
        str | None,
        Option(
            "The dense model.",
            MEASUREMENT,
            unset="the model that was pruned, as recorded",
            metavar="DENSE",
        ),
    ] = None
    speed: Annotated[
        bool,
        Option(
            "Measure speed as well.",
            MEASUREMENT,
            flags=("--speed/--no-speed",),
            details="Takes memory for the model dense and packed at once.",
        ),
    ] = True
    continuations: Annotated[
        bool,
        Option(
            "Let both models continue texts.",
            MEASUREMENT,
            flags=("--continuations/--no-continuations",),
            details="Takes memory for one whole model at a time.",
        ),
    ] = True
    tasks: Annotated[
        str | None,
        Option(
            "Results of lm-evaluation-harness for OUT, a results_*.json, to keep and "
            "show.",
            MEASUREMENT,
            metavar="FILE",
        ),
    ] = None
    dense_tasks: Annotated[
        str | None,
        Option(
            "The same for the dense model.",
            MEASUREMENT,
            metavar="FILE",
        ),
    ] = None
    data: Annotated[
        str,
        Option("Text to measure on, as for `halve eval`.", TEXT),
    ] = "wikitext2"
    seq_len: Annotated[
        int | None,
        Option(
            "Length of a segment, as for `halve eval`.",
            TEXT,
            unit="tokens",
            unset="as for halve eval",
            minimum=2,
        ),
    ] = None
    segments: Annotated[
        int | None,
        Option("Maximum number of segments.", TEXT, unset="all", minimum=1),
    ] = None
    card: Annotated[
        bool,
        Option(
            "Write OUT/README.md as well, a model card for the Hub.",
            OUTPUT,
            details="A README.md that Halve has not made is not overwritten.",
        ),
    ] = False
    file: Annotated[
        str | None,
        Option(
            "File of the page.",
            OUTPUT,
            unset="OUT/report.html",
            flags=("--out", "-o"),
            metavar="FILE",
        ),
    ] = None
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    progress: Callable[[str], None] = lambda step: None

    @property
    def measures(self) -> bool:
        """Whether anything is measured or kept before the page is written."""
        return self.measure or self.tasks is not None

    def check(self) -> None:
        """Raise HalveError on the first option that is invalid."""
        check_device(self.device)
        check_ranges(self)
        if self.measure:
            parse_text_name(self.data)
        if self.dense_tasks is not None and self.tasks is None:
            raise HalveError(
                "dense_tasks holds results of the dense model, but there are none of "
                "the pruned one.",
                "Set tasks as well (--tasks).",
            )
        if not self.measure:
            self._check_unused()

    def _check_unused(self) -> None:
        """Raise HalveError if an option was given that only matters with measure."""
        default = ReportOptions
        names = ("against", "speed", "continuations", "data", "seq_len", "segments")
        for name in names:
            if getattr(self, name) != getattr(default, name):
                raise HalveError(
                    f"{name} was given, but nothing is measured.",
                    "Set measure as well (--measure).",
                )


class ReportKeywords(TypedDict, total=False):
    """The fields of `ReportOptions` as keywords."""

    measure: bool
    against: str | None
    speed: bool
    continuations: bool
    tasks: str | None
    dense_tasks: str | None
    data: str
    seq_len: int | None
    segments: int | None
    card: bool
    file: str | None
    device: str
    trust_remote_code: bool
    progress: Callable[[str], None]
