"""The entry of config.json that marks a packed checkpoint, and its version."""

from collections.abc import Iterable
from typing import Any

from halve.errors import UnsupportedModelError
from halve.formats.registry import version_of

METHOD = "halve"
# Version of the format -> first release of Halve that reads it.
_REQUIRES = {1: "0.1", 2: "0.2"}
VERSION = max(_REQUIRES)


def quantization_config(formats: Iterable[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a packed checkpoint's config.json.

    Args:
        formats: Names of the formats of its matrices, `stack` for those in stacks. The
            version is the lowest that has all of them, so that older releases read what
            they can.
    """
    version = max((version_of(name) for name in formats), default=1)
    return {
        "quant_method": METHOD,
        "version": version,
        "requires_halve": _REQUIRES[version],
    }


def check_version(where: object, entry: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if this version of Halve cannot read a checkpoint.

    Args:
        where: Folder or file, for the message.
        entry: The `quantization_config`, with `quant_method: halve`.
    """
    version = entry.get("version")
    if isinstance(version, int) and version in _REQUIRES:
        return
    required = entry.get("requires_halve")
    newer = f"Halve {str(required)[:20]} or newer" if required else "a newer Halve"
    raise UnsupportedModelError(
        f"The model in {where} is packed in version {str(version)[:20]} of the format; "
        f"this Halve reads versions up to {VERSION}.",
        f"Install {newer}, or unpack the model with it.",
    )
