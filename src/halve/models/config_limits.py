"""What a config from a stranger may claim, looked at before anything believes it.

transformers makes lists and modules of whatever number it is told, fills masks of
`n_positions` squared, reads other files where a config names them, and fetches kernels
where a config says so. Numbers are bounded here, and a model is built for nothing once,
on the meta device, to see how large it would be.
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

# Far above any count of layers, heads, experts, labels or widths: 2**16 is the widest.
_MAX = 2**18
# Words in the names of numbers that count nothing that is made one by one.
_SIZES = re.compile(
    r"theta|base|seed|token|vocab|length|len|ctx|context|position|window|param|(_|^)ids?$"
)
# Modules of a model; 126 blocks of Llama have 2,000. Each takes some kilobytes.
_MAX_MODULES = 20_000
# Bytes of tables that a model computes for itself: masks, sines and cosines. The most
# known, those of 34 blocks of CodeGen, are 140 MiB.
_MAX_TABLES = 2**29
_CHECK_CONFIG = "Check its config.json; if it belongs to the model, open an issue."
# Entries that lead transformers to other files than those that are checked here.
_DETOURS = ("configuration_files", "transformers_weights")


def check_config_limits(folder: Path, entries: dict[str, Any]) -> None:
    """Raise where a config.json claims what no model has, or leads elsewhere.

    Raises:
        CheckpointError: A number is NaN or beyond all bounds.
        UnsupportedModelError: It names other files, or code on the hub.
    """
    for name in _DETOURS:
        if name in entries:
            raise UnsupportedModelError(
                f"The config of {folder} names other files by {name}, which are not "
                "followed.",
                "Take that entry out, and put what it names in its place.",
            )
    for path, value in _leaves(entries):
        _check_number(folder, path[-1], value)
        if "implementation" in ".".join(path) and "/" in str(value):
            raise UnsupportedModelError(
                f"The config of {folder} asks for code from the hub: "
                f"{truncated(path[-1])} is {truncated(value)}.",
                "Take that entry out.",
            )


def _leaves(entries: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield everything that is no list and no object, with the names on its way."""
    stack: list[tuple[tuple[str, ...], object]] = [((), entries)]
    while stack:  # not by recursion: it is nested as deep as a stranger likes
        path, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(((*path, str(name)), inner) for name, inner in value.items())
        elif isinstance(value, list):
            stack.extend((path, inner) for inner in value)
        else:
            yield path, value


def _check_number(folder: Path, key: str, value: object) -> None:
    if isinstance(value, float) and value != value:  # noqa: PLR0124  (that is NaN)
        found = "NaN"
    elif isinstance(value, int) and value > _MAX and not _SIZES.search(key):
        found = truncated(value, 40)
    else:
        return
    raise CheckpointError(
        f"The config of {folder} says that {truncated(key)} is {found}; no model has "
        "that.",
        _CHECK_CONFIG,
    )


def check_size(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Build a model on the meta device, and raise where it is larger than any.

    Raises:
        UnsupportedModelError: It has more modules, or larger tables, than any model.
    """
    with torch.device("meta"), _counted(folder):
        model = build()
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    if tables > _MAX_TABLES:
        raise UnsupportedModelError(
            f"The config of {folder} asks for masks and tables of {tables} bytes, "
            f"{_MAX_TABLES} at most are believed.",
            "Check the number of positions in its config.json.",
        )


@contextmanager
def _counted(folder: Path) -> Iterator[None]:
    """Stop at a number of modules."""
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise UnsupportedModelError(
                f"The config of {folder} asks for more than {_MAX_MODULES} modules.",
                "Check the number of layers in its config.json.",
            )

    hook = register_module_module_registration_hook(one_more)
    try:
        yield
    finally:
        hook.remove()
