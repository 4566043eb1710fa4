"""The private part of PEFT by which it learns of layers that are not its own."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def register_lora_layers(
    config: Any,  # noqa: ANN401  (peft.LoraConfig)
    layers: Mapping[type[nn.Module], type[nn.Module]],
) -> None:
    """Let a `LoraConfig` wrap layers of some classes by layers of others.

    PEFT documents the method as experimental. When it is gone, look for its successor
    in "Custom models" of PEFT's manual.
    """
    config._register_custom_module(dict(layers))
