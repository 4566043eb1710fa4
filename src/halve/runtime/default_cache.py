"""Whether a call of `generate` leaves the kind of its cache to the model."""

from typing import Any


def makes_default_cache(model: Any, kwargs: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether `generate` would make a cache of its own, of the default kind.

    Args:
        model: A transformers model.
        kwargs: The keywords of the call.
    """
    configs = kwargs.get("generation_config"), model.generation_config
    asked = kwargs.get("past_key_values"), kwargs.get("cache_implementation")
    return (
        asked == (None, None)
        and kwargs.get("use_cache") is not False
        and all(c is None or c.use_cache is not False for c in configs)
        and all(c is None or c.cache_implementation is None for c in configs)
    )
