"""With which versions, and when, a result was made."""

import datetime
from importlib import metadata


def versions() -> dict[str, str]:
    """Return the versions of Halve, torch and transformers, by package name."""
    return {name: metadata.version(name) for name in ("halve", "torch", "transformers")}


def now() -> str:
    """Return the current time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
