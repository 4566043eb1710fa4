"""Lets transformers know packed checkpoints as soon as Halve is imported.

`import halve` costs nothing, and importing transformers takes seconds; so where it is
not there yet, its import is awaited. transformers has no plug-in discovery of its own.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AWAITED = "transformers.quantizers"


def register_with_transformers() -> None:
    """Register the quantizer now, or when transformers has been imported."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


def _register() -> None:
    # By name: nothing here may be loaded before it is needed.
    import_module("halve.integrations.transformers.quantizer").register()


class _Awaiting(MetaPathFinder):
    """Finds nothing itself; adds a step to the import that it waits for."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _AWAITED or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec
