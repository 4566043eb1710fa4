"""Halve prunes large language models in one shot and proves what it did.

    import halve
    halve.prune("facebook/opt-125m", "out", sparsity="2:4", calibration="wikitext2")
    halve.perplexity("out", data="wikitext2")
    halve.inspect("out")
    halve.verify("out")
    halve.pack("out", "out-packed")

Names are loaded on first use, so that `import halve` costs nothing. After it,
transformers' own `from_pretrained` loads packed models, and they run sparse.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halve.integrations.transformers.hook import register_with_transformers

if TYPE_CHECKING:
    from halve.api import inspect, pack, perplexity, prune, unpack, verify
    from halve.errors import HalveError
    from halve.runtime.generation import generate, load

__version__ = "0.1.0"

_HOMES = {
    "HalveError": "halve.errors",
    "generate": "halve.runtime.generation",
    "inspect": "halve.api",
    "load": "halve.runtime.generation",
    "pack": "halve.api",
    "perplexity": "halve.api",
    "prune": "halve.api",
    "unpack": "halve.api",
    "verify": "halve.api",
}

__all__ = [
    "HalveError",
    "generate",
    "inspect",
    "load",
    "pack",
    "perplexity",
    "prune",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_transformers()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
