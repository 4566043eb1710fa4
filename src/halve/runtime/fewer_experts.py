"""A checkpoint and a model of which each block keeps some of its experts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from halve.checkpoint import Checkpoint, SelectedCheckpoint, Selection
from halve.models import (
    FewerExperts,
    MetaModel,
    Place,
    StoredTensor,
    TensorMap,
    match_names,
    plan_fewer_experts,
)
from halve.runtime.blockwise_model import BlockwiseModel

# Path of a module of experts in the model -> the experts that it keeps, ascending.
Kept = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExpertSelection:
    """Sees the experts of a checkpoint that are kept, numbered anew.

    Attributes:
        checkpoint: The checkpoint with all experts.
        tensors: Where it holds the parameters of its model.
        fewer: The model with fewer experts.
    """

    checkpoint: Checkpoint
    tensors: TensorMap
    fewer: FewerExperts

    def keep(self, kept: Kept) -> SelectedCheckpoint:
        """Return the checkpoint without the other experts.

        Args:
            kept: Of modules that are left out, the first experts are kept.
        """
        chosen = {path: self._first for path in self.fewer.modules} | dict(kept)
        selections = dict(self._unchanged)
        for path, numbers in chosen.items():
            for name, dimension in self._beside[path].items():
                selections[name] = Selection(name, dimension, numbers)
            for new, old in enumerate(numbers):
                for stored, source in self._renamed(path, new, old):
                    selections[stored] = Selection(source)
            for name in self._fused[path]:
                selections[name] = Selection(name, 0, numbers)
        return SelectedCheckpoint.of(self.checkpoint, selections)

    @property
    def _first(self) -> tuple[int, ...]:
        return tuple(range(self.fewer.kept))

    @cached_property
    def _unchanged(self) -> dict[str, Selection]:
        """Name -> the same tensor, for all that remain, in the checkpoint's order.

        Blocks for multi-token prediction are left out: they hold experts that nobody
        has scored. What else the model does not read, such as a vision tower, remains.
        """
        used = {place.tensor for place in self.tensors.places.values()}
        unread = [name for name in self.checkpoint.tensors if name not in used]
        dropped = {
            place.tensor
            for path in self.fewer.modules
            for number in range(self.fewer.kept, self.fewer.total)
            for place in self._places[path][number].values()
            if place.index is None
        }
        dropped |= _with_experts(unread, self.fewer.meta_model.model.base_model_prefix)
        return {n: Selection(n) for n in self.checkpoint.tensors if n not in dropped}

    @cached_property
    def _places(self) -> dict[str, list[dict[str, Place]]]:
        """Path of a module of experts -> parameter -> place, for each expert."""
        found: dict[str, list[dict[str, Place]]] = {}
        for path, layers in self.tensors.experts.items():
            found[path] = [
                {
                    f"{layer.name}.{parameter}": self.tensors.places[
                        f"{path}.{number}.{layer.name}.{parameter}"
                    ]
                    for layer in layers.layers
                    for parameter in layer.parameters
                }
                for number in range(layers.count)
            ]
        return found

    def _renamed(self, path: str, new: int, old: int) -> list[tuple[str, str]]:
        """Return new name and source of an expert's own tensors."""
        pairs = zip(
            self._places[path][new].values(),
            self._places[path][old].values(),
            strict=True,
        )
        return [(a.tensor, b.tensor) for a, b in pairs if a.index is None]

    @cached_property
    def _fused(self) -> dict[str, set[str]]:
        """Path of a module of experts -> tensors that hold all its experts."""
        return {
            path: {place.tensor for place in every[0].values() if place.index == 0}
            for path, every in self._places.items()
        }

    @cached_property
    def _beside(self) -> dict[str, dict[str, int]]:
        """Path of a module of experts -> tensors beside it -> dimension of experts."""
        found: dict[str, dict[str, int]] = {path: {} for path in self.fewer.modules}
        for name, dimension in self.fewer.dimensions.items():
            if name in self.tensors.places:  # else a buffer that is in no file
                tensor = self.tensors.places[name].tensor
                found[self.fewer.module_of(name)][tensor] = dimension
        return found


def _with_experts(names: Iterable[str], prefix: str) -> set[str]:
    """Return the tensors of those parts of a checkpoint that hold experts.

    A part is a block (`model.layers.61`), or what lies beside the base model (`mtp`).

    Args:
        names: Tensors that the model does not read.
        prefix: Name of the base model within the model.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        block = re.match(rf"{prefix}\..*?\.\d+(?=\.)", name)
        parts.setdefault(block[0] if block else name.partition(".")[0], []).append(name)
    return {
        name
        for part in parts.values()
        if any(".experts." in name for name in part)
        for name in part
    }


def select_experts(
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    fraction: float,
    trust_remote_code: bool = False,
) -> ExpertSelection:
    """Prepare to keep a fraction of the experts of each block of a model.

    Raises:
        UnsupportedModelError: See `plan_fewer_experts`.
        PatternError: See `plan_fewer_experts`.
    """
    tensors = _match(meta_model, checkpoint)
    fewer = plan_fewer_experts(
        checkpoint.folder, meta_model, tensors.experts, fraction, trust_remote_code
    )
    return ExpertSelection(checkpoint, tensors, fewer)


def with_fewer_experts(
    model: BlockwiseModel, selection: ExpertSelection, kept: Kept
) -> BlockwiseModel:
    """Return a model of which each block keeps some of its experts.

    Args:
        model: The model with all experts.
        selection: Made of its checkpoint.
        kept: As for `ExpertSelection.keep`.

    Raises:
        CheckpointError: A tensor does not have the shape that the config asks for.
    """
    checkpoint, meta_model = selection.keep(kept), selection.fewer.meta_model
    found = _match(meta_model, checkpoint)
    return replace(
        model,
        checkpoint=checkpoint,
        meta_model=meta_model,
        places=found.places,
        experts=found.experts,
    )


def _match(meta_model: MetaModel, checkpoint: Checkpoint) -> TensorMap:
    infos = checkpoint.tensors.values()
    return match_names(
        meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
    )
