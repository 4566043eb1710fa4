"""Registers packed checkpoints with transformers when Halve is imported.

transformers does not discover plug-ins, and importing it takes seconds, which
`import halve` must not cost. So if transformers has not been imported yet, a finder in
`sys.meta_path` registers the quantizer as soon as it is. Every `import torch` imports
Halve (`halve_autoload`), so this also happens in programs that have nothing to do with
it: the finder never raises, and warns instead.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from halve.errors import HalveWarning

# The module in which quantizers are registered, and one that every loading of a model
# imports after it.
_QUANTIZERS, _MODELS = "transformers.quantizers", "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Register the quantizer, now or when transformers is imported.

    transformers may be in the midst of its import, since it imports torch, and torch
    Halve. The module of quantizers is then incomplete and can no longer be waited for,
    so the quantizer is registered after the import of the module of models.
    """
    quantizers = sys.modules.get(_QUANTIZERS)
    if hasattr(quantizers, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        awaited = _QUANTIZERS if quantizers is None else _MODELS
        sys.meta_path.insert(0, _RegisterOnImport(awaited))


def _register() -> None:
    # Imported here because it imports transformers.
    from halve.integrations.transformers.quantizer import register  # noqa: PLC0415

    register()


def _register_or_warn() -> None:
    try:
        _register()
    except Exception as error:  # noqa: BLE001  (transformers must stay importable)
        warnings.warn(
            "Halve could not make its format known to transformers "
            f"({type(error).__name__}: {error}), so packed models cannot be loaded. "
            "Install a version of transformers that Halve supports.",
            HalveWarning,
            stacklevel=2,
        )


class _RegisterOnImport(MetaPathFinder):
    """Finds no module itself, but adds a step to the import of one."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited
        # Set while the other finders are asked, so that this one does not call itself.
        self.asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.awaited or self.asking:
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
            _register_or_warn()

        spec.loader.exec_module = execute_and_register
        return spec
