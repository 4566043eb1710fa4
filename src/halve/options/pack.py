"""Options of packing and unpacking."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from halve.option import OUTPUT, Option, Options, documented
from halve.options.shared import TrustRemoteCode

if TYPE_CHECKING:
    from halve.records import Progress


@documented
@dataclass(frozen=True)
class PackOptions(Options):
    """Options of packing and unpacking."""

    positive_zeros: Annotated[
        bool,
        Option(
            "Turn negative zeros into zeros first, which saves their bytes.",
            OUTPUT,
            details="They result from multiplying a weight by a mask. Otherwise they "
            "are stored like any other weight, bit for bit.",
        ),
    ] = False
    trust_remote_code: TrustRemoteCode = False
    progress: "Callable[[Progress], None]" = lambda progress: None
