"""Limits on what an untrusted config may ask for, checked before it is acted on.

transformers creates as many modules as a config says, fills masks of `n_positions`
squared, reads other files where a config names them, and downloads kernels where a
config says so. Here numbers are bounded, such entries are refused, and the model is
built once on the meta device, where it costs little, to see how large it would be.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from halve.errors import CheckpointError, UnsupportedModelError
from halve.untrusted import truncated

# Far above any number of layers, heads, experts, labels or any width: 2**16 is the
# widest.
_MAX_COUNT = 2**18
# Parts of the names of numbers that are not bounded: nothing is allocated, or looped
# over, that many times.
_UNBOUNDED = re.compile(
    r"theta|base|seed|token|vocab|length|len|ctx|context|position|window|param|(_|^)ids?$"
)
# Modules in a model; Llama's 126 blocks have 2,000. Each takes some kilobytes.
_MAX_MODULES = 20_000
# Bytes of the tables that a model computes for itself: masks, sines and cosines. The
# largest known, those of 34 blocks of CodeGen, are 140 MiB.
_MAX_TABLES = 2**29
_CHECK_CONFIG = "Check its config.json; if it belongs to the model, open an issue."
# Entries by which transformers reads other files than those that are checked here.
_REDIRECTS = ("configuration_files", "transformers_weights")


def check_config_limits(folder: Path, entries: dict[str, Any]) -> None:
    """Check the entries of a config.json, before transformers reads them.

    Raises:
        CheckpointError: A number is NaN or out of bounds.
        UnsupportedModelError: The config refers to other files, or to code on the Hub.
    """
    for name in _REDIRECTS:
        if name in entries:
            raise UnsupportedModelError(
                f"The config of {folder} refers to other files by {name}, which Halve "
                "does not follow.",
                "Remove that entry, and put the contents of the files in its place.",
            )
    for path, value in _leaves(entries):
        _check_number(folder, path[-1], value)
        if "implementation" in ".".join(path) and "/" in str(value):
            raise UnsupportedModelError(
                f"The config of {folder} asks for code from the Hub: "
                f"{truncated(path[-1])} is {truncated(value)}.",
                "Remove that entry.",
            )


def _leaves(entries: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield every value that is neither list nor object, with the keys above it."""
    stack: list[tuple[tuple[str, ...], object]] = [((), entries)]
    while stack:  # not recursive: untrusted JSON may be nested to any depth
        path, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(((*path, str(name)), inner) for name, inner in value.items())
        elif isinstance(value, list):
            stack.extend((path, inner) for inner in value)
        else:
            yield path, value


def _check_number(folder: Path, key: str, value: object) -> None:
    if isinstance(value, float) and value != value:  # noqa: PLR0124  (that is NaN)
        shown = "NaN"
    elif isinstance(value, int) and value > _MAX_COUNT and not _UNBOUNDED.search(key):
        shown = truncated(value, 40)
    else:
        return
    raise CheckpointError(
        f"The config of {folder} sets {truncated(key)} to {shown}, which is out of "
        "bounds.",
        _CHECK_CONFIG,
    )


def check_model_size(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Build a model on the meta device, and check how large it would be.

    Args:
        folder: The model's folder, for messages.
        build: Builds the model from its config.

    Raises:
        UnsupportedModelError: It has too many modules, or too large tables.
    """
    with torch.device("meta"), _limited_modules(folder):
        model = build()
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    if tables > _MAX_TABLES:
        raise UnsupportedModelError(
            f"The config of {folder} asks for masks and tables of {tables} bytes; the "
            f"limit is {_MAX_TABLES}.",
            "Check the number of positions in its config.json.",
        )


@contextmanager
def _limited_modules(folder: Path) -> Iterator[None]:
    """Raise within the constructor that registers one module too many."""
    count = 0

    def count_module(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise UnsupportedModelError(
                f"The config of {folder} asks for more than {_MAX_MODULES} modules.",
                "Check the number of layers in its config.json.",
            )

    hook = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        hook.remove()
