"""LoRA over pruned layers, packed or dense, with a merge that keeps the zeros.

Needs PEFT, which is imported by this module only.
"""

from typing import Any

import torch
from peft import LoraConfig  # pyright: ignore[reportMissingImports]
from peft.tuners.lora.layer import (  # pyright: ignore[reportMissingImports]
    Linear as LoraLinear,
)
from peft.tuners.tuners_utils import (  # pyright: ignore[reportMissingImports]
    check_adapters_to_merge,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from halve._compat.peft import register_lora_layers
from halve.errors import HalveError
from halve.runtime.cpu.packed_linear import PackedLinear


def sparse_lora(config: LoraConfig, keep_zeros: bool = True) -> LoraConfig:
    """Let a LoRA configuration apply to pruned models, packed ones included.

        model = AutoModelForCausalLM.from_pretrained("opt-packed")
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, sparse_lora(config))

    Packed layers stay packed while adapters are trained. With `keep_zeros` an adapter
    changes only weights that were kept: it computes (W + M * sBA) x, where M is 1 for
    kept weights and 0 for others. So `merge_and_unload` gives the same model as the
    adapter, with the zeros of W; a packed layer becomes dense by it, and can be packed
    again. Without, it computes W x + sB(Ax), as PEFT does, which is faster, but has no
    merged form with these zeros; for packed layers merging is refused.

    Args:
        config: Changed in place.
        keep_zeros: Whether adapters keep zeros.

    Returns:
        The same object. To load a saved adapter, pass one like it as `config` to
        `PeftModel.from_pretrained`.

    Cost:
        With `keep_zeros` a pass computes each adapted matrix dense, one at a time, and
        the backward pass computes it again.
    """
    layer = SparseLora if keep_zeros else PackedLora
    dense = (nn.Linear, Conv1D) if keep_zeros else ()
    register_lora_layers(config, {kind: layer for kind in (PackedLinear, *dense)})
    return config


class _PackedTarget(LoraLinear):
    """LoRA over a layer that PEFT does not know, whose sizes it would guess at."""

    def _get_in_out_features(self, module: nn.Module) -> Any:  # noqa: ANN401
        """Return inputs and outputs of a layer."""
        if isinstance(module, PackedLinear):
            return module.in_features, module.out_features
        return super()._get_in_out_features(module)


class PackedLora(_PackedTarget):
    """LoRA as PEFT computes it, over a packed layer."""

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Raise HalveError: what is added has no zeros."""
        raise HalveError(
            "This adapter changes weights that were pruned, so it cannot be merged "
            "into a packed layer.",
            "Save the adapter by itself, or train it with sparse_lora(config, "
            "keep_zeros=True).",
        )


class SparseLora(_PackedTarget):
    """LoRA that changes only the kept weights of a layer, packed or dense."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(base_layer, *args, **kwargs)
        # The packed layer, while a dense one with adapters merged is in its place.
        self._packed: list[PackedLinear] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Multiply [..., in_features] to [..., out_features]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self._active():
            inputs = self.lora_dropout[adapter](x)
            # Saved for the backward pass, the delta would be a dense matrix.
            added = checkpoint(self._added, inputs, adapter, use_reentrant=False)
            result = result + added.to(result.dtype)
        return result

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add adapters to the kept weights; a packed layer becomes dense."""
        names = check_adapters_to_merge(self, adapter_names)
        deltas = [self.get_delta_weight(n) for n in names if n in self.lora_A]
        if not deltas:
            return
        if isinstance(self.base_layer, PackedLinear):
            self._packed = [self.base_layer]
            self.base_layer = self.base_layer.to_dense()
        weight: Any = self.base_layer.weight
        for delta in deltas:
            weight.data = weight.data + delta.to(weight.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take merged adapters out; a layer that was packed is packed again."""
        weight: Any = self.base_layer.weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if not self._packed:
                weight.data = weight.data - self.get_delta_weight(name).to(weight.dtype)
        if self._packed:
            self.base_layer = self._packed.pop()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return M * sBA, oriented as the layer's dense weight is stored, float32."""
        delta = self._delta(adapter).detach()
        return delta.T if self._is_transposed else delta

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _added(self, inputs: Tensor, adapter: str) -> Tensor:
        delta = self._delta(adapter)
        return functional.linear(inputs.to(delta.dtype), delta)

    def _delta(self, adapter: str) -> Tensor:
        """Return M * sBA, [out_features, in_features], float32."""
        parts: Any = self.lora_B[adapter].weight, self.lora_A[adapter].weight
        product = self.scaling[adapter] * (parts[0].float() @ parts[1].float())
        return product.masked_fill(self._zeros(), 0)

    @torch.no_grad()
    def _zeros(self) -> Tensor:
        """Return True where a weight was pruned, [out_features, in_features]."""
        layer: Any = self._packed[0] if self._packed else self.base_layer
        if isinstance(layer, PackedLinear):
            return layer.dense_weight() == 0
        return (layer.weight.T if self._is_transposed else layer.weight) == 0

    @property
    def _is_transposed(self) -> bool:
        """Whether a dense weight is stored as [in_features, out_features]."""
        layer = self._packed[0] if self._packed else self.base_layer
        if isinstance(layer, PackedLinear):
            return layer.transposed
        return isinstance(layer, Conv1D)
