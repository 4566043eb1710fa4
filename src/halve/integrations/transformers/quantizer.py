"""How transformers loads a packed checkpoint: `quant_method: halve` in config.json.

Imported while transformers itself is being imported, so whatever needs the rest of it
is imported on use.
"""

# ruff: noqa: PLC0415

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halve.errors import HalveError
from halve.formats import METHOD, check_version


class HalveConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint; unknown entries are kept."""

    def __init__(self, **entries: Any) -> None:  # noqa: ANN401
        self.quant_method: Any = METHOD
        for name, value in entries.items():
            setattr(self, name, value)


class HalveQuantizer(HfQuantizer):
    """Puts sparse layers into a model and lets its weights be loaded as they lie."""

    requires_calibration = True  # packs nothing on the fly: `halve pack` does

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse a version of the format that this Halve does not know."""
        check_version("this folder", self.quantization_config.to_dict())

    def _process_model_before_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.replace_modules import install_sparse_layers

        if not checkpoint_files:
            raise HalveError(
                "A packed model can only be loaded from its files.",
                "Pass from_pretrained the folder, and no state_dict.",
            )
        install_sparse_layers(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.kernels import kernels
        from halve.runtime.cpu.layers import use_own_products
        from halve.runtime.cpu.replace_modules import check_layers, sparse_layers
        from halve.runtime.cuda.fallback import unpack_on_cuda

        check_layers(model)
        unpack_on_cuda(model)
        if any(True for _ in sparse_layers(model)):
            kernels()  # says now, and not in the first product, if there are none
            use_own_products(model)
        else:
            self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.replace_modules import make_dense

        make_dense(model)
        return model.to(dtype)

    def is_serializable(self) -> Any:  # noqa: ANN401  (the base class says None)
        """Say that `save_pretrained` writes what was loaded."""
        return True

    @property
    def is_trainable(self) -> Any:  # noqa: ANN401  (the base class says None)
        """Say that no gradient passes."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Say that `torch.compile` can take the model whole."""
        return True


def register() -> None:
    """Make transformers know `quant_method: halve`; twice is harmless."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(HalveConfig)
        register_quantizer(METHOD)(HalveQuantizer)
