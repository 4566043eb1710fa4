"""The quantization config of vLLM for packed checkpoints, and the method of its layers.

Importing this module imports vLLM. Interfaces are those of vLLM 0.32:
`QuantizationConfig` and `QuantizeMethodBase` in `quantization.base_config`.
"""

# vLLM needs an environment of its own, with other versions of torch and transformers.
# pyright: reportMissingImports=false

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from halve.errors import CheckpointError, UnsupportedModelError
from halve.formats import METHOD, check_version, companion_suffixes
from halve.integrations.vllm.parts import Parts, Shard
from halve.runtime.cpu.kernels import kernels
from halve.runtime.cpu.layers import LAYERS

# Classes of layers that hold the matrices of many experts; names differ by release.
_EXPERTS = tuple(
    getattr(fused_moe, name)
    for name in ("FusedMoE", "RoutedExperts")
    if isinstance(getattr(fused_moe, name, None), type)
)


@register_quantization_config(METHOD)
class HalveConfig(QuantizationConfig):
    """The `quantization_config` of a packed checkpoint."""

    def get_name(self) -> Any:  # noqa: ANN401
        """Return `halve`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations: those of checkpoints."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability of GPUs that is needed: none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HalveConfig":
        """Return the config, or raise UnsupportedModelError for a newer version."""
        check_version("this folder", config)
        return cls()

    def get_quant_method(
        self, layer: nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """Return the method of a layer: that of dense ones, with another loader.

        Raises:
            UnsupportedModelError: The layer holds experts.
        """
        if isinstance(layer, _EXPERTS):
            raise UnsupportedModelError(
                "Packed mixtures of experts cannot be loaded in vLLM.",
                "Make the model dense with `halve unpack`.",
            )
        if isinstance(layer, LinearBase):
            return HalveMethod(UnquantizedLinearMethod(), prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return HalveMethod(UnquantizedEmbeddingMethod(), prefix)
        return None


class HalveMethod(QuantizeMethodBase):
    """Loads a layer from packed matrices, and runs it dense or by Halve's kernels.

    Attributes:
        dense: vLLM's method for dense layers of this kind.
        parts: What has been loaded.
        is_tied: Whether the layer shares the weight of another, which loads it.
        layers: The packed layers that run, in the order of their outputs; empty if the
            dense method runs.
    """

    def __init__(self, dense: QuantizeMethodBase, name: str) -> None:
        self.dense = dense
        self.parts = Parts(name)
        self.is_tied = False
        self.layers: list[Any] = []

    def create_weights(
        self,
        layer: nn.Module,
        *arguments: Any,  # noqa: ANN401
        weight_loader: Any,  # noqa: ANN401
        **keywords: Any,  # noqa: ANN401
    ) -> None:
        """Create the dense weight, and a place for each other part of packed ones.

        The memory of the dense weight is not touched before it is filled.
        """
        self.load_dense = weight_loader
        keywords["weight_loader"] = self.parts.loader("")
        self.dense.create_weights(layer, *arguments, **keywords)
        for suffix in companion_suffixes():
            place = nn.Parameter(torch.empty(0), requires_grad=False)
            place.weight_loader = self.parts.loader(suffix)  # pyright: ignore
            layer.register_parameter(f"weight{suffix}", place)
        if not hasattr(layer, "load_weights"):
            # Fused layers have it. Without it vLLM warns of every part, whose dtype is
            # not that of its place.
            layer.load_weights = partial(_load_weights, layer)  # pyright: ignore

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the matrices packed where Halve's kernels run, else unpack them.

        Raises:
            CheckpointError: A matrix is missing, incomplete or inconsistent.
        """
        for suffix in companion_suffixes():
            delattr(layer, f"weight{suffix}")
        if self.is_tied:
            self.dense.process_weights_after_loading(layer)
            return
        shards = self.parts.shards()
        if not shards:
            raise CheckpointError(
                f"The checkpoint has no weight for {self.parts.name}.",
                "Use the config.json that belongs to it, or download it again.",
            )
        if _runs_packed(layer, shards):
            self._keep_packed(layer, shards)
        else:
            self._fill(layer, shards)
        self.parts.tensors.clear()

    def _keep_packed(self, layer: Any, shards: list[Shard]) -> None:  # noqa: ANN401
        dtype = layer.weight.dtype
        for shard in shards:
            packed: Any = shard.matrix
            self.layers.append(LAYERS[shard.format](packed.to(dtype)))
        layer.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def _fill(self, layer: Any, shards: list[Shard]) -> None:  # noqa: ANN401
        for shard in shards:
            which = () if shard.id is None else (shard.id,)
            self.load_dense(layer.weight, shard.dense(), *which)
        self.dense.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply [..., inputs] to [..., outputs], and add a bias."""
        if not self.layers:
            return self.dense.apply(layer, x, bias)
        if len(self.layers) == 1:
            return self.layers[0](x, bias)
        joined = torch.cat([each(x) for each in self.layers], dim=-1)
        return joined if bias is None else joined + bias

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Look up rows of an embedding."""
        return self.dense.embedding(layer, input_)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let an output head share the weight of the embedding."""
        self.is_tied = True
        return self.dense.tie_weights(layer, embed_tokens)


def _load_weights(
    layer: Any,  # noqa: ANN401
    weights: Iterable[tuple[str, Tensor]],
) -> Iterator[str]:
    """Give each stored tensor to the loader of its parameter, and yield its name."""
    for name, tensor in weights:
        parameter = getattr(layer, name)
        if parameter is not None:  # a bias that the layer does not have
            parameter.weight_loader(parameter, tensor)
            yield name


def _runs_packed(layer: Any, shards: list[Shard]) -> bool:  # noqa: ANN401
    """Whether a layer runs by Halve's kernels.

    Some layers are never called; their weight is read instead, for which vLLM's
    attribute stands.
    """
    return (
        current_platform.is_cpu()
        and isinstance(layer, LinearBase)
        and layer.tp_size == 1
        and not getattr(layer, "_cpu_skip_gemm_dispatch", False)
        and kernels() is not None
        and all(shard.format in LAYERS for shard in shards)
    )
