"""How a model calls its blocks, recorded from the model itself.

Masks, rotary embeddings and positions are made by the model's own forward and differ
from block to block where kinds of attention differ. So the model runs once with every
block replaced by a stand-in that notes its arguments; a block is then replayed with
its own. Nothing here knows any family.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import UnsupportedModelError
from halve.models.meta_model import MetaModel


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on hidden states, [batch, length, width], and return the next."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class CapturedCalls:
    """How the blocks are called for one batch.

    Attributes:
        calls: One for each block.
        as_tuple: Whether the model expects its blocks to return a tuple.
    """

    calls: tuple[BlockCall, ...]
    as_tuple: bool

    def same_as(self, other: "CapturedCalls") -> bool:
        """Whether every block is called alike, value by value."""
        return all(
            _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
            for a, b in zip(self.calls, other.calls, strict=True)
        )


class _Reached(Exception):  # noqa: N818  (no error: the last block was reached)
    pass


class _Unlike(Exception):  # noqa: N818  (the next convention is tried)
    pass


class _StandIn(nn.Module):
    """Takes a block's place; models read attributes of their blocks, so pass those."""

    def __init__(self, block: nn.Module, shared: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule: it must not be counted
        self.shared = shared
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if args:
            received, args = args[0], args[1:]
        else:
            received = kwargs.pop("hidden_states", None)
        self.call = BlockCall(args, kwargs)
        return self._answer(received)

    def _answer(self, received: Any) -> Any:  # noqa: ANN401
        shared = self.shared
        if "output" in shared:  # running the tail
            hidden = shared["output"]
        else:
            hidden = shared.setdefault("hidden", received)
            if received is not hidden or not isinstance(received, Tensor):
                raise _Unlike
            if self is shared["last"]:
                raise _Reached
        return (hidden,) if shared["as_tuple"] else hidden


@contextmanager
def _stand_ins_installed(
    blocks: nn.ModuleList, shared: dict[str, Any]
) -> Iterator[list]:
    real = list(blocks)
    stand_ins = [_StandIn(block, shared) for block in real]
    shared["last"] = stand_ins[-1]
    for index, stand_in in enumerate(stand_ins):
        blocks[index] = stand_in
    try:
        yield stand_ins
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


def capture_calls(
    meta_model: MetaModel, input_ids: Tensor
) -> tuple[Tensor, CapturedCalls]:
    """Run everything before the blocks and note how each would be called.

    Args:
        meta_model: Its parameters outside the blocks hold values.
        input_ids: [batch, length].

    Returns:
        The hidden states that enter the first block, [batch, length, width], and the
        recording.

    Raises:
        UnsupportedModelError: The model changes hidden states between its blocks, so
            that they cannot be run one by one.
    """
    for as_tuple in (False, True):
        shared: dict[str, Any] = {"as_tuple": as_tuple}
        with _stand_ins_installed(meta_model.blocks, shared) as stand_ins:
            try:
                meta_model.model(input_ids, use_cache=False)
            except _Reached:
                calls = tuple(stand_in.call for stand_in in stand_ins)
                return shared["hidden"], CapturedCalls(calls, as_tuple)
            except _Unlike:
                continue
    raise UnsupportedModelError(
        f"{type(meta_model.model).__name__} changes its hidden states between blocks, so "
        "they cannot be run one after the other.",
        "Open an issue that names the model.",
    )


def run_tail(
    meta_model: MetaModel, input_ids: Tensor, hidden: Tensor, captured: CapturedCalls
) -> Tensor:
    """Run everything after the blocks.

    Args:
        meta_model: Its parameters outside the blocks hold values.
        input_ids: [batch, length].
        hidden: What the last block gave, [batch, length, width].
        captured: Of these input_ids, or others of their shape.

    Returns:
        Logits, [batch, length, vocabulary].
    """
    shared = {"as_tuple": captured.as_tuple, "output": hidden}
    with _stand_ins_installed(meta_model.blocks, shared):
        return meta_model.model(input_ids, use_cache=False).logits


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b
