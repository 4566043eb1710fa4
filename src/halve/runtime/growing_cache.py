"""A cache of keys and values with room for tokens to come.

transformers' own cache copies all keys and values for each new token.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Buffers grow by half, but at least by this many positions.
_MIN_GROWTH = 256


class Room:
    """Keys or values of a block, in a buffer that holds more positions.

    Attributes:
        buffer: [batch, heads, capacity, width], or None if nothing is stored yet.
        length: Positions that are filled.
    """

    def __init__(self) -> None:
        self.buffer: Any = None
        self.length = 0

    @property
    def filled(self) -> Tensor | None:
        """The filled positions, a view."""
        return None if self.buffer is None else self.buffer[:, :, : self.length]

    def replace(self, value: Tensor | None) -> None:
        """Store other contents, such as a part of the old ones or reordered ones."""
        if value is None or value.numel() == 0:
            self.buffer, self.length = None, 0
            return
        if not self._is_part(value):
            self.buffer = value
        self.length = value.shape[2]

    def _is_part(self, value: Tensor) -> bool:
        own = self.buffer
        return (
            own is not None
            and value.data_ptr() == own.data_ptr()
            and value.stride() == own.stride()
            and value.shape[:2] == own.shape[:2]
        )

    def append(self, new: Tensor) -> None:
        """Append positions, [batch, heads, tokens, width]."""
        if self.buffer is None:
            self.buffer = new[:, :, :0]
        length = self.length + new.shape[2]
        self.reserve(length)
        self.buffer[:, :, self.length : length] = new
        self.length = length

    def reserve(self, length: int) -> None:
        """Move the contents to a larger buffer unless this one holds `length`."""
        own = self.buffer
        if length <= own.shape[2]:
            return
        # Memory that is never written to takes no room.
        capacity = length + max(_MIN_GROWTH, length // 2)
        self.buffer = own.new_empty(*own.shape[:2], capacity, own.shape[3])
        self.buffer[:, :, : self.length] = own[:, :, : self.length]


class GrowingLayer(DynamicLayer):
    """The cache of one block whose keys and values have room to grow.

    Attributes:
        key_room: The keys.
        value_room: The values.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        self.key_room, self.value_room = Room(), Room()
        super().__init__(**kwargs)

    @property
    def keys(self) -> Any:  # noqa: ANN401
        """All keys, [batch, heads, length, width], or None."""
        return self.key_room.filled

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.key_room.replace(value)

    @property
    def values(self) -> Any:  # noqa: ANN401
        """All values, as `keys`."""
        return self.value_room.filled

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.value_room.replace(value)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [batch, heads, tokens, width], and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_room.append(key_states)
        self.value_room.append(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of positions."""
        return self.key_room.length


class GrowingCache(DynamicCache):
    """A cache as `generate` makes it, whose full layers grow in place.

    Layers that keep a window or another state stay transformers' own.

    Attributes:
        step: What decodes with this cache, or None; see `halve.runtime.decode`.
        obstacle: Why there is no step, or None if there is one or none was tried.
    """

    def __init__(self, config: Any) -> None:  # noqa: ANN401
        super().__init__(config=config)
        self.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer
            for layer in self.layers
        ]
        self.step: Any = None
        self.obstacle: str | None = None
