"""Record how a model calls its decoder blocks, so that each can be run by itself.

Masks, rotary embeddings and positions are computed by the model's own forward, and
differ from block to block where a model mixes kinds of attention. So the model runs
once with every block replaced by a module that records its arguments; each block is
replayed with those. No code here depends on a model family.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halve.errors import UnsupportedModelError
from halve.models.meta_model import MetaModel

# From the hidden states to what a block returns.
Convention = Callable[[Tensor], Any]
# What blocks return besides their hidden states (caches, attention weights) is None in
# passes that need neither. The newest convention of transformers comes first.
_CONVENTIONS: tuple[Convention, ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)
# What a model raises that unpacks or indexes something else.
_UNPACKING_ERRORS = (ValueError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class BlockCall:
    """The arguments that one block is called with, apart from its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on hidden states, of the model's shape, and return the next."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output


@dataclass(frozen=True)
class CapturedCalls:
    """The calls of all blocks for one batch.

    Attributes:
        calls: One per block, in order.
        convention: What the model expects its blocks to return.
    """

    calls: tuple[BlockCall, ...]
    convention: Convention

    def same_as(self, other: "CapturedCalls") -> bool:
        """Whether the arguments of every block are equal, value by value."""
        return all(
            _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
            for a, b in zip(self.calls, other.calls, strict=True)
        )


class _LastBlockReached(Exception):  # noqa: N818  (control flow, not an error)
    """Every block has been called: nothing after the blocks needs to run."""


class _UnexpectedInput(Exception):  # noqa: N818  (the next convention is tried)
    """A block was not given what the block before it returned."""


@dataclass
class _ForwardPass:
    """What the recording blocks of one forward pass share.

    Attributes:
        convention: What the blocks return.
        output: What the last block returns, where the pass runs what comes after the
            blocks; None where the pass records calls.
        hidden: The hidden states that entered the first block.
    """

    convention: Convention
    output: Tensor | None = None
    hidden: Any = None


class _RecordingBlock(nn.Module):
    """Take a block's place and record its arguments.

    Models read attributes of their blocks (a kind of attention, say), so unknown
    attributes are those of the block.
    """

    def __init__(self, block: nn.Module, shared: _ForwardPass, is_last: bool) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, which would register the block as a submodule.
        self.__dict__["_block"] = block
        self.shared = shared
        self.is_last = is_last
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        self.call = BlockCall(args, kwargs)
        return self.shared.convention(self._output(hidden))

    def _output(self, hidden: Any) -> Any:  # noqa: ANN401
        """Return what the next block, or the tail of the model, is to receive.

        While calls are recorded, every block returns its input: then each must receive
        the very tensor that entered the first, or the model computes between blocks.
        """
        if self.shared.output is not None:
            return self.shared.output
        if self.shared.hidden is None:
            self.shared.hidden = hidden
        if hidden is not self.shared.hidden or not isinstance(hidden, Tensor):
            raise _UnexpectedInput
        if self.is_last:
            raise _LastBlockReached
        return hidden


@contextmanager
def _recording(blocks: nn.ModuleList, shared: _ForwardPass) -> Iterator[list[Any]]:
    """Replace the blocks by recording ones for a while."""
    real = list(blocks)
    recorders = [
        _RecordingBlock(block, shared, is_last=index == len(real) - 1)
        for index, block in enumerate(real)
    ]
    for index, recorder in enumerate(recorders):
        blocks[index] = recorder
    try:
        yield recorders
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


def capture_calls(
    meta_model: MetaModel, input_ids: Tensor
) -> tuple[Tensor, CapturedCalls]:
    """Run everything before the blocks, and record how each block would be called.

    Blocks are assumed to return a tensor; where the model does not cope with that, a
    tuple, which is the older convention of transformers.

    Args:
        meta_model: The model; its parameters outside the blocks must hold values.
        input_ids: [batch, length].

    Returns:
        The hidden states that enter the first block, [batch, length, width] or of
        another shape that the model has chosen, and the recorded calls.

    Raises:
        UnsupportedModelError: The model changes hidden states between its blocks, so
            the blocks cannot be run one by one.
    """
    first_error: Exception | None = None
    for number, convention in enumerate(_CONVENTIONS):
        shared = _ForwardPass(convention)
        with _recording(meta_model.blocks, shared) as recorders:
            try:
                meta_model.model(input_ids, use_cache=False)
            except _LastBlockReached:
                calls = tuple(recorder.call for recorder in recorders)
                return shared.hidden, CapturedCalls(calls, convention)
            except _UnexpectedInput:
                continue
            except _UNPACKING_ERRORS as error:
                first_error = error if number == 0 else first_error
    if first_error is not None:
        raise first_error
    raise UnsupportedModelError(
        f"{type(meta_model.model).__name__} changes its hidden states between blocks, "
        "so they cannot be run one after the other.",
        "Open an issue that names the model.",
    )


def sample_axis(meta_model: MetaModel, ids: Tensor, states: Tensor) -> int:
    """Return the dimension of a model's hidden states that counts the samples.

    Args:
        meta_model: The model; its parameters outside the blocks must hold values.
        ids: One sample, [1, length].
        states: The hidden states that enter the first block for it.

    Raises:
        UnsupportedModelError: There is none.
    """
    usual = 3  # [batch, length, width]
    if states.dim() == usual and states.shape[:2] == ids.shape:
        return 0
    # Gemma 3n has [4, batch, length, width]: two samples show which one it is.
    twice, _ = capture_calls(meta_model, ids.repeat(2, 1))
    shapes = zip(states.shape, twice.shape, strict=False)
    axes = [axis for axis, (one, two) in enumerate(shapes) if one != two]
    if len(axes) == 1 and (states.shape[axes[0]], twice.shape[axes[0]]) == (1, 2):
        return axes[0]
    raise UnsupportedModelError(
        f"The hidden states of {type(meta_model.model).__name__} have the shape "
        f"{list(states.shape)}, in which no dimension counts the samples.",
        "Open an issue that names the model.",
    )


def run_tail(
    meta_model: MetaModel, input_ids: Tensor, hidden: Tensor, captured: CapturedCalls
) -> Tensor:
    """Run everything after the blocks.

    Args:
        meta_model: The model; its parameters outside the blocks must hold values.
        input_ids: [batch, length].
        hidden: The output of the last block, of the model's shape.
        captured: The calls for these input_ids, or for others of the same shape.

    Returns:
        Logits, [batch, length, vocabulary].
    """
    shared = _ForwardPass(captured.convention, output=hidden)
    with _recording(meta_model.blocks, shared):
        return meta_model.model(input_ids, use_cache=False).logits


def _equal(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Compare arguments; caches and other objects by identity or their own `==`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or a == b
