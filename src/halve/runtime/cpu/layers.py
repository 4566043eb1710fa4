"""The layer class of each packed format."""

from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.packed_linear import PackedLinear

# Name of the format, as in `halve.formats.FORMATS` -> layer.
LAYERS: dict[str, type[PackedLinear]] = {"bitmask": BitmaskLinear}
