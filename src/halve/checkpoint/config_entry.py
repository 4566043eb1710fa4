"""What config.json says of quantized weights, read before the model is built."""

from pathlib import Path
from typing import Any

from halve.formats import declared_entry
from halve.untrusted import read_json

CONFIG = "config.json"


def read_entry(folder: Path) -> dict[str, Any] | None:
    """Return the entry that describes quantized weights; None if there is none.

    A config that cannot be read has none: whoever builds the model reports it.
    """
    try:
        return declared_entry(read_json(folder / CONFIG, folder))
    except (OSError, ValueError, RecursionError):
        return None
