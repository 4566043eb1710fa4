"""Which tensor of a checkpoint fills which parameter of the model.

Names differ: checkpoints of OPT, GPT-2 and BLOOM on the Hub omit the prefix of the base
model, and old checkpoints use old names. transformers knows all of them, so its own
tables are used. Experts are named as `models.experts.Experts` names them, one linear
layer for each matrix, whether the checkpoint has a tensor for each or one for all.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halve._compat.transformers import Merging, ignored_tensors
from halve.errors import CheckpointError
from halve.models.experts import (
    ExpertLayers,
    experts_in,
    fused_leaf,
    fused_parameters,
)
from halve.models.foreign_names import explain_names
from halve.models.meta_model import MetaModel
from halve.models.renaming import (
    converting_renamer,
    is_of_experts,
    merging_unsupported,
)

_WHAT_TO_USE = "Use the config.json that belongs to this checkpoint."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a checkpoint describes it.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape as stored.
        dtype: Its dtype as stored; None where it is unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Place:
    """Where a checkpoint holds a parameter: in a tensor, or in a slice of one.

    Attributes:
        tensor: Name of the tensor.
        index: Index along its first dimension, which is that of experts; None where
            the parameter is the whole tensor.
    """

    tensor: str
    index: int | None = None

    def __str__(self) -> str:
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"

    def view(self, tensor: Tensor) -> Tensor:
        """Return the parameter's part of the tensor, which is not copied."""
        return tensor if self.index is None else tensor[self.index]


@dataclass(frozen=True)
class TensorMap:
    """Where a checkpoint holds the parameters and buffers of a model.

    Attributes:
        places: Parameter or buffer -> its place. Those of experts are named as in
            `Experts`: `model.layers.0.mlp.experts.3.gate_proj.weight`.
        experts: Path of each module of experts in the model -> its layers.
    """

    places: dict[str, Place]
    experts: dict[str, ExpertLayers]

    def experts_of(self, block: str) -> dict[str, ExpertLayers]:
        """Return path within a block -> layers, for the block's modules of experts."""
        prefix = f"{block}."
        return {
            path.removeprefix(prefix): layers
            for path, layers in self.experts.items()
            if path.startswith(prefix)
        }


def match_names(meta_model: MetaModel, stored: Iterable[StoredTensor]) -> TensorMap:
    """Find the place of each parameter and buffer of the model in the checkpoint.

    Tied parameters have the place of the one that is stored. Tensors that the model
    does not use (old masks, rotary frequencies) are left out.

    Raises:
        CheckpointError: A parameter has no tensor, one of another shape or one of
            integers; or there are tensors of more blocks or experts than the model has.
        UnsupportedModelError: Tensors are merged on loading in a way that is not known.
    """
    matching, stored = _Matching(meta_model.model), list(stored)
    for tensor in stored:
        target = matching.add(tensor)
        if target is not None:
            _check_unused(meta_model, tensor.name, target)
    try:
        experts = matching.expert_layers()
        tied = _tied_places(meta_model.model, matching.places, experts)
    except CheckpointError as error:
        names = (tensor.name for tensor in stored)
        found = explain_names(names, meta_model.model.state_dict())
        if found is None:
            raise
        problem = f"{error.problem} Its names are those of {found[0]}."
        raise CheckpointError(problem, found[1]) from error
    return TensorMap(matching.places | tied, experts)


def match_experts(model: Any, stored: Iterable[StoredTensor]) -> TensorMap:  # noqa: ANN401
    """Find the places of the parameters of all experts of a model.

    Args:
        model: A model of transformers; its parameters may be on the meta device.
        stored: The tensors of its checkpoint.

    Raises:
        CheckpointError: A parameter of an expert has no tensor, or one that does not
            fit it.
        UnsupportedModelError: Matrices of experts are merged on loading in a way that
            is not known.
    """
    matching = _Matching(model)
    for tensor in stored:
        matching.add_of_experts(tensor)
    return TensorMap(matching.places, matching.expert_layers())


@dataclass
class _Matching:
    """The places of a model's parameters, while tensor after tensor is looked at.

    Attributes:
        model: The model.
        places: Parameter or buffer -> its place.
        parts: Path of a module of experts -> 3-D parameter -> names of the layers whose
            matrices it joins, by their position.
    """

    model: Any
    places: dict[str, Place] = field(default_factory=dict)
    parts: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._state = self.model.state_dict()
        self._rename = converting_renamer(self.model, self._state)
        self._experts = experts_in(self.model)
        self._fused = {p: fused_parameters(m) for p, m in self._experts.items()}

    def add(self, tensor: StoredTensor) -> str | None:
        """Find out what one tensor of the checkpoint fills.

        Returns:
            The name that the model would give it, where it fills nothing.
        """
        target, merging = self._rename(tensor.name)
        if target not in self._state:
            return target
        if not self._added_to_experts(tensor, target, merging):
            if merging is not None:
                raise merging_unsupported(self.model, tensor.name, merging[1])
            _check_fits(tensor, self._state[target])
            self.places[target] = Place(tensor.name)
        return None

    def add_of_experts(self, tensor: StoredTensor) -> None:
        """Find out what one tensor fills if it belongs to experts; else ignore it."""
        target, merging = self._rename(tensor.name)
        if target in self._state:
            self._added_to_experts(tensor, target, merging)

    def _added_to_experts(
        self, tensor: StoredTensor, target: str, merging: tuple[int, Merging] | None
    ) -> bool:
        """Find the places in a tensor; return whether it belongs to experts."""
        owner, _, leaf = target.rpartition(".")
        name, kind = fused_leaf(leaf)
        if name not in self._fused.get(owner, {}):
            return False
        self._add_experts(tensor, owner, (name, kind), merging)
        return True

    def _add_experts(
        self,
        tensor: StoredTensor,
        owner: str,
        leaf: tuple[str, str],
        merging: tuple[int, Merging] | None,
    ) -> None:
        """Find the places in a tensor of one expert, or of all experts.

        Args:
            tensor: The tensor.
            owner: Path of the module of experts.
            leaf: Its 3-D parameter, and `weight` or `bias`.
            merging: What transformers makes the parameter of, and which of its parts
                the tensor is; None where the checkpoint holds all experts in one.
        """
        name, kind = leaf
        parts = self.parts.setdefault(owner, {}).setdefault(name, {})
        if merging is None:
            parts[0] = name
            bias = "_bias" if kind == "bias" else ""
            _check_fits(tensor, self._state[f"{owner}.{name}{bias}"])
            for number in range(len(self._fused[owner][name])):
                place = Place(tensor.name, number)
                self.places[f"{owner}.{number}.{name}.{kind}"] = place
            return
        position, merged = merging
        number, part = self._expert_of(tensor.name, merged)
        parts[position] = part
        self._check_expert(tensor, owner, name, number, len(merged.sources))
        self.places[f"{owner}.{number}.{part}.{kind}"] = Place(tensor.name)

    def _expert_of(self, name: str, merging: Merging) -> tuple[int, str]:
        """Return the expert that a tensor belongs to, and the name of its layer."""
        known = is_of_experts(merging)
        _, *found = name.rsplit(".", 3)
        if not known or len(found) != 3 or not found[0].isdecimal():  # noqa: PLR2004
            raise merging_unsupported(self.model, name, merging)
        number, part, _ = found
        return int(number), part

    def _check_expert(
        self, tensor: StoredTensor, owner: str, name: str, number: int, joined: int
    ) -> None:
        """Check the tensor of one expert against the 3-D parameter of all."""
        parameter = self._fused[owner][name]
        if number >= len(parameter):
            raise CheckpointError(
                f"Tensor {tensor.name} belongs to expert {number}, but the config asks "
                f"for {len(parameter)} experts.",
                _WHAT_TO_USE,
            )
        _check_fits(tensor, parameter[0, : parameter.shape[1] // joined])

    def expert_layers(self) -> dict[str, ExpertLayers]:
        """Return the layers of each module of experts, all of which have places.

        Raises:
            CheckpointError: One has none.
        """
        layers = {
            path: ExpertLayers.of(module, self._part_names(path))
            for path, module in self._experts.items()
        }
        for path, experts in layers.items():
            for parameter in _expert_parameters(path, experts):
                if parameter not in self.places:
                    raise _missing(parameter)
        return layers

    def _part_names(self, path: str) -> dict[str, list[str]]:
        """Return 3-D parameter -> names of the layers that it joins, in order."""
        return {
            name: [parts[position] for position in sorted(parts)]
            for name, parts in self.parts.get(path, {}).items()
        }


def _expert_parameters(path: str, experts: ExpertLayers) -> Iterator[str]:
    """Yield the names of the parameters of all experts of a module."""
    for layer in experts.layers:
        for inner in experts.paths(layer):
            for name in layer.parameters:
                yield f"{path}.{inner}.{name}"


def _check_fits(tensor: StoredTensor, parameter: torch.Tensor) -> None:
    expected = tuple(parameter.shape)
    if tensor.shape != expected:
        raise CheckpointError(
            f"Tensor {tensor.name} has the shape {list(tensor.shape)}, but the "
            f"config asks for {list(expected)}.",
            _WHAT_TO_USE,
        )
    is_integer = tensor.dtype is not None and not tensor.dtype.is_floating_point
    if is_integer and parameter.is_floating_point():
        raise CheckpointError(
            f"Tensor {tensor.name} holds {tensor.dtype} where floating-point numbers "
            "were expected.",
            "If the checkpoint is quantized, use the one that it was made from.",
        )


def _check_unused(meta_model: MetaModel, name: str, target: str) -> None:
    """Refuse a tensor of a block past the last: it would silently stay dense."""
    ignored = ignored_tensors(meta_model.model)
    base = meta_model.model.base_model_prefix
    for full in (target, f"{base}.{target}"):
        index = full.removeprefix(meta_model.path + ".").partition(".")[0]
        inside = full.startswith(meta_model.path + ".") and index.isdecimal()
        known = any(re.search(pattern, full) for pattern in ignored)
        if inside and int(index) >= len(meta_model.blocks) and not known:
            raise CheckpointError(
                f"Tensor {name} belongs to block {index}, but the config asks for "
                f"{len(meta_model.blocks)} blocks.",
                _WHAT_TO_USE,
            )


def _missing(parameter: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint has no tensor for {parameter}, which the config asks for.",
        f"{_WHAT_TO_USE[:-1]}, or download the missing shard.",
    )


def _tied_places(
    model: nn.Module, places: dict[str, Place], experts: dict[str, ExpertLayers]
) -> dict[str, Place]:
    """Return the places of parameters that are stored under another name.

    Args:
        model: The model, its tied parameters being one object each.
        places: Parameter -> its place, for names that are stored.
        experts: The modules of experts, whose parameters have places of their own.
    """
    aliases: dict[int, list[str]] = {}
    fused = {f"{path}.{x.fused}" for path, y in experts.items() for x in y.layers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.removesuffix("_bias") not in fused:
            aliases.setdefault(id(parameter), []).append(name)
    tied: dict[str, Place] = {}
    for names in aliases.values():
        source = next((places[name] for name in names if name in places), None)
        if source is None:
            raise _missing(names[0])
        tied |= {name: source for name in names if name not in places}
    return tied
