"""Options that several commands have."""

from typing import Annotated

from halve.errors import HalveError
from halve.option import RESOURCES, Option
from halve.options.choices import ACTIVATION_CHOICES, DEVICE_CHOICES

LENGTH = "the model's maximum, or 2048 if that is less"

Device = Annotated[
    str, Option("Where to compute: cpu, cuda, or auto (for now the CPU).", RESOURCES)
]
ActivationMemory = Annotated[
    int | None,
    Option(
        "Memory for hidden states, such as 8GiB; the rest spills to disk.",
        RESOURCES,
        unit="bytes",
        unset="a quarter of the machine's memory",
        metavar="SIZE",
        details="Spilled hidden states are read from a memory-mapped file. Changes no "
        "result.",
    ),
]
Activations = Annotated[
    str,
    Option(
        "How inputs are multiplied with packed codes: as integers of 16 or 8 bits.",
        RESOURCES,
        choices=ACTIVATION_CHOICES,
        details="int16 loses less than bfloat16 inputs do. int8 is faster, and changes "
        "results by about 0.6 %, more where a few inputs are far larger than the rest.",
    ),
]
BOS_DETAILS = (
    "auto: where the tokenizer puts the token in front of a text by itself, as it does "
    "for models that were trained with it, except for OPT, BLOOM and GPT-2, whose "
    "published figures are of windows without. never: as for those, the text is "
    "tokenized once and cut."
)
TrustRemoteCode = Annotated[
    bool, Option("Allow Python code that comes with the model to run.")
]


def check_device(name: str) -> None:
    """Raise HalveError if a device is of no kind that Halve supports."""
    if name != "auto" and name.partition(":")[0] not in DEVICE_CHOICES:
        raise HalveError(
            f"{name!r} is not a device that Halve supports.",
            f"Use --device auto, {' or '.join(DEVICE_CHOICES)}.",
        )
