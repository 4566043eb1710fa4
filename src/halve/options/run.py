"""Options of a pruning run that change no result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypedDict

from halve.option import RESOURCES, TARGET, Option, Options, documented
from halve.options.shared import ActivationMemory, TrustRemoteCode

if TYPE_CHECKING:
    from halve.records import Progress


@documented
@dataclass(frozen=True)
class RunOptions(Options):
    """Options of a pruning run that change no result."""

    activation_memory: ActivationMemory = None
    memory: Annotated[
        int | None,
        Option(
            "Limit on the memory of the whole process, such as 20GiB.",
            RESOURCES,
            unit="bytes",
            unset="no limit",
            metavar="SIZE",
            details="Decides how much of the hidden states spills to disk, and whether "
            "the Gram matrices of a block's widest inputs are deferred and computed "
            "from disk. A run that cannot fit is refused before it starts. Changes no "
            "result.",
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False
    yes: Annotated[
        bool,
        Option(
            "Do what loses much: drop more than half of the experts (--experts).",
            TARGET,
        ),
    ] = False
    progress: "Callable[[Progress], None]" = lambda progress: None


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions` as keywords."""

    activation_memory: int | None
    memory: int | None
    trust_remote_code: bool
    yes: bool
    progress: "Callable[[Progress], None]"
