"""What a block's groups are given in the dense model, kept from its one dense pass."""

from pathlib import Path

from torch import Tensor

from halve.pruning.observe.activation_cache import ActivationCache
from halve.pruning.observe.block_state import BlockState, flat
from halve.pruning.observe.input_groups import Group, hooks


def cache_dense_inputs(
    state: BlockState, groups: list[Group], budget: int, folder: Path | None
) -> ActivationCache:
    """Carry the dense stream through the block, which is dense still.

    Args:
        state: The block.
        groups: Whose inputs are kept.
        budget: Bytes of them that may live in memory.
        folder: Where mapped files lie past that.

    Raises:
        UnsupportedModelError: A module is not given one input for each token.
        OutputError: The disk has no room.
    """
    share = budget // max(len(groups), 1)
    kept = ActivationCache.memory_plan(
        state.dense_stream, state.planned.name, groups, share, folder
    )
    met: dict[str, list[Tensor]] = {group.leader: [] for group in groups}

    def note(path: str, inputs: Tensor) -> None:
        met[path].append(flat(inputs).clone())  # what runs later may change them

    def keep(part: slice, _: Tensor) -> None:
        for path, calls in met.items():
            for call, inputs in enumerate(calls):
                kept.keep(path, call, part, inputs)
            calls.clear()

    with hooks(state.block, met, note):
        state.dense_stream.advance(state.block, state.planned.index, keep)
    return kept
