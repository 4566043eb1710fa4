"""Presets: options under one name, for those who do not want to choose."""

from typing import Any

from halve.errors import HalveError

# Preset -> the options of pruning that differ from their defaults. Their times and
# losses are in the README.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"solver": "sparsegpt"},
    "default": {},
    "best": {"refine": True, "samples": 256, "self_samples": "25%"},
}


def preset_options(name: str) -> dict[str, Any]:
    """Return field -> value of a preset, for `PruneOptions` or as keywords of `prune`.

    Raises:
        HalveError: There is no such preset.
    """
    if name not in PRESETS:
        raise HalveError(
            f"There is no preset {name!r}.",
            f"Choose one of {', '.join(PRESETS)} (--preset).",
        )
    return dict(PRESETS[name])
