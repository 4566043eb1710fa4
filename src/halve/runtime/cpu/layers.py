"""The layer classes of each packed format."""

from typing import Any

from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.quantized_linear import QuantizedEmbedding, QuantizedLinear

# Name of the format, as in `halve.formats.FORMATS` -> PackedLinear, from a matrix of
# that format and a bias.
LAYERS: dict[str, Any] = {"bitmask": BitmaskLinear, "quantized": QuantizedLinear}
# Likewise -> PackedEmbedding, where the format has one.
EMBEDDINGS: dict[str, Any] = {"quantized": QuantizedEmbedding}
