"""The quantizer by which transformers loads packed checkpoints.

transformers selects it for `quant_method: halve` in config.json. This module is
imported while transformers itself is being imported, so modules that need the rest of
it are imported inside functions.
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
    """The `quantization_config` of a packed checkpoint; keeps unknown entries."""

    def __init__(self, **entries: Any) -> None:  # noqa: ANN401
        self.quant_method: Any = METHOD
        for name, value in entries.items():
            setattr(self, name, value)


class HalveQuantizer(HfQuantizer):
    """Installs packed layers before transformers loads the weights into them."""

    # Models are packed by `halve pack`, not while they are loaded.
    requires_calibration = True
    # Whether models are prepared for `generate` by Halve's kernels, which changes their
    # class: only where nobody else gets hold of them, as in `halve serve`.
    prepares_decoding = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Raise UnsupportedModelError on a version that this Halve cannot read."""
        check_version("this folder", self.quantization_config.to_dict())

    def _process_model_before_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.replace_modules import install_packed_layers

        if not checkpoint_files:
            raise HalveError(
                "A packed model can only be loaded from its files.",
                "Pass from_pretrained the folder, and no state_dict.",
            )
        install_packed_layers(model, checkpoint_files)
        return model

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],
        model: Any,  # noqa: ANN401
    ) -> list[Any]:
        """Leave out the merging of matrices that packed experts hold one by one."""
        from halve.models import merges_experts
        from halve.runtime.cpu.packed_experts import packed_experts_in

        if packed_experts_in(model):
            weight_conversions = [
                entry
                for entry in weight_conversions
                if not (hasattr(entry, "operations") and merges_experts(entry))
            ]
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(
        self,
        model: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.dense_linear import use_dense_kernel
        from halve.runtime.cpu.kernels import kernels
        from halve.runtime.cpu.replace_modules import (
            check_layers,
            packed_layers,
            use_device_kernels,
        )
        from halve.runtime.decode import prepare

        check_layers(model)
        if use_device_kernels(model):
            kernels()  # warns now, rather than in the first product, if there are none
            use_dense_kernel(model)
        if not any(True for _ in packed_layers(model)):
            self.remove_quantization_config(model)
        elif self.prepares_decoding:
            prepare(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:  # noqa: ANN401
        from halve.runtime.cpu.replace_modules import make_dense

        make_dense(model)
        return model.to(dtype)

    def is_serializable(self) -> Any:  # noqa: ANN401  (declared None in the base)
        """True: `save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> Any:  # noqa: ANN401  (declared None in the base)
        """True: adapters over packed layers can be trained (`halve.integrations.lora`).

        Packed weights themselves have no gradients. Trainer refuses to train a model
        without adapters in any case.
        """
        return True

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` captures the model in one graph."""
        return True


def register() -> None:
    """Register `quant_method: halve` with transformers, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(HalveConfig)
        register_quantizer(METHOD)(HalveQuantizer)
