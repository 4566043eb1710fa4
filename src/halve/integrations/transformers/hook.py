"""Registers packed checkpoints with transformers when Halve is imported.

transformers does not discover plug-ins, and importing it takes seconds, which
`import halve` must not cost. So if transformers has not been imported yet, a finder in
`sys.meta_path` registers the quantizer as soon as it is.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_MODULE = "transformers.quantizers"


def register_with_transformers() -> None:
    """Register the quantizer, now or when transformers is imported."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _register() -> None:
    # Imported here because it imports transformers.
    from halve.integrations.transformers.quantizer import register  # noqa: PLC0415

    register()


class _RegisterOnImport(MetaPathFinder):
    """Finds no module itself, but adds a step to the import of one."""

    def __init__(self) -> None:
        # Set while the other finders are asked, so that this one does not call itself.
        self.asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _MODULE or self.asking:
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
