"""Options of recovery."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypedDict

from halve.errors import HalveError
from halve.option import (
    CALIBRATION,
    TRAINING,
    Option,
    Options,
    check_choice,
    check_ranges,
    documented,
)
from halve.options.choices import BOS_CHOICES
from halve.options.shared import (
    BOS_DETAILS,
    LENGTH,
    Device,
    TrustRemoteCode,
    check_device,
)
from halve.text_name import parse_text_name

if TYPE_CHECKING:
    from halve.records import Progress

_SHORTEST = 2


@documented
@dataclass(frozen=True)
class RecoverOptions(Options):
    """Options of recovery."""

    calibration: Annotated[
        str,
        Option(
            "Text to learn from, named as for `halve prune`: c4, wikitext2, ptb, a "
            "data set, a .txt, .jsonl or .parquet file, stdlib (this Python's "
            "sources), or self (text sampled from the dense model).",
            CALIBRATION,
            details="It need not be the text that the model was pruned with; the "
            "more, the better.",
        ),
    ] = "c4"
    samples: Annotated[
        int,
        Option(
            "Number of windows to learn from; they are used in turn.",
            CALIBRATION,
            minimum=1,
        ),
    ] = 1024
    seq_len: Annotated[
        int | None,
        Option("Length of a window.", CALIBRATION, unit="tokens", unset=LENGTH),
    ] = None
    held_out: Annotated[
        int,
        Option(
            "Number of windows, of other documents, by which the best state is chosen.",
            CALIBRATION,
            minimum=1,
        ),
    ] = 32
    seed: Annotated[
        int, Option("Seed for drawing the windows.", CALIBRATION, minimum=0)
    ] = 0
    bos: Annotated[
        str,
        Option(
            "Whether every window begins with the tokenizer's BOS token.",
            CALIBRATION,
            choices=BOS_CHOICES,
            details=BOS_DETAILS,
        ),
    ] = "auto"
    steps: Annotated[
        int | None,
        Option(
            "Number of optimizer steps.",
            TRAINING,
            unset="512, unless minutes are given",
            minimum=1,
        ),
    ] = None
    minutes: Annotated[
        float | None,
        Option(
            "Take as many steps as fit into this time, in the place of a number.",
            TRAINING,
            unit="minutes",
            unset="no limit",
            details="The first steps are timed, and the number of steps, on which the "
            "learning rate depends, is decided then. A run that is resumed takes the "
            "number that was decided.",
        ),
    ] = None
    batch: Annotated[
        int, Option("Windows in a step.", TRAINING, unit="windows", minimum=1)
    ] = 8
    learning_rate: Annotated[
        float,
        Option(
            "Largest step of AdamW, as a fraction of the root mean square of each "
            "parameter's nonzero values.",
            TRAINING,
            flags=("--lr",),
            details="It rises over the first tenth of the steps and falls to a "
            "twentieth along a cosine. In trials a model of 30 blocks learned "
            "nothing at 0.001; one of 6 won more at 0.002, given a thousand steps.",
        ),
    ] = 0.0005
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    progress: "Callable[[Progress], None]" = lambda progress: None

    def check(self) -> None:
        """Raise HalveError on the first option, or combination, that is invalid."""
        check_device(self.device)
        check_ranges(self)
        check_choice(self, "bos")
        parse_text_name(self.calibration)
        if self.seq_len is not None and self.seq_len < _SHORTEST:
            raise HalveError(
                f"seq_len is {self.seq_len}, which leaves no token to predict.",
                "Set seq_len to 2 or more (--seq-len).",
            )
        if self.steps is not None and self.minutes is not None:
            raise HalveError(
                "steps and minutes were given, and only one can limit the run.",
                "Pass --steps or --minutes.",
            )
        self._check_positive("minutes", "--minutes")
        self._check_positive("learning_rate", "--lr")

    def _check_positive(self, name: str, flag: str) -> None:
        value = getattr(self, name)
        if value is not None and not 0 < value < float("inf"):
            raise HalveError(
                f"{name} is {value}, which is not a positive number.",
                f"Set {name} above 0 ({flag}).",
            )


class RecoverKeywords(TypedDict, total=False):
    """The fields of `RecoverOptions` as keywords."""

    calibration: str
    samples: int
    seq_len: int | None
    held_out: int
    seed: int
    bos: str
    steps: int | None
    minutes: float | None
    batch: int
    learning_rate: float
    device: str
    trust_remote_code: bool
    progress: "Callable[[Progress], None]"
