"""The entry of config.json by which a packed checkpoint is known."""

from typing import Any

from halve.errors import UnsupportedModelError

METHOD = "halve"
VERSION = 1
# The first Halve that reads what is written here.
_REQUIRES = "0.1"


def quantization_config() -> dict[str, Any]:
    """Return what `quantization_config` of a packed checkpoint's config.json holds."""
    return {"quant_method": METHOD, "version": VERSION, "requires_halve": _REQUIRES}


def check_version(where: object, entry: dict[str, Any]) -> None:
    """Raise UnsupportedModelError where a later Halve wrote an entry.

    Args:
        where: Folder or file, for the message.
        entry: The `quantization_config`, with `quant_method: halve`.
    """
    version = entry.get("version")
    if version == VERSION:
        return
    needed = entry.get("requires_halve")
    newer = f"Halve {str(needed)[:20]} or newer" if needed else "a newer Halve"
    raise UnsupportedModelError(
        f"The model in {where} is packed in version {str(version)[:20]} of the format; "
        f"this Halve reads version {VERSION}.",
        f"Install {newer}, or unpack the model with it.",
    )
