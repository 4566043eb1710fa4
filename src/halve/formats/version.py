"""The entry of config.json that marks a packed checkpoint, and its version."""

from typing import Any

from halve.errors import UnsupportedModelError

METHOD = "halve"
VERSION = 1
# The first release of Halve that reads this version.
_REQUIRES = "0.1"


def quantization_config() -> dict[str, Any]:
    """Return the `quantization_config` of a packed checkpoint's config.json."""
    return {"quant_method": METHOD, "version": VERSION, "requires_halve": _REQUIRES}


def check_version(where: object, entry: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if this version of Halve cannot read a checkpoint.

    Args:
        where: Folder or file, for the message.
        entry: The `quantization_config`, with `quant_method: halve`.
    """
    version = entry.get("version")
    if version == VERSION:
        return
    required = entry.get("requires_halve")
    newer = f"Halve {str(required)[:20]} or newer" if required else "a newer Halve"
    raise UnsupportedModelError(
        f"The model in {where} is packed in version {str(version)[:20]} of the format; "
        f"this Halve reads version {VERSION}.",
        f"Install {newer}, or unpack the model with it.",
    )
