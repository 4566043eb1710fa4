"""Experts of a mixture as ordinary linear layers, one module for each expert.

transformers holds the matrices of all experts of a block in 3-D parameters. While a
block is lent, `unfused` replaces such a module by one that has linear layers named as
the checkpoint names them: hooks, solvers and block reconstruction then need not know of
experts. The gate, the activation and its limits stay the model's own, so no family has
code here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halve._compat.transformers import (
    ExpertsTraits,
    experts_traits,
    gate_experts,
)
from halve.errors import UnsupportedModelError

# Parameters of all experts, in the order in which they are used. A module has one of
# the first two.
_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"
_FUSED = (*_FIRST, _LAST)
_BIAS = "_bias"
# Dimensions of a parameter that holds the matrices of all experts.
_FUSED_DIMENSIONS = 3
# Children of the module around the experts that decide where tokens go, or how much the
# output of a shared expert counts: gate, router, shared_expert_gate. Where the block
# itself is that module (Gemma 4), it has layers with other gates.
_ROUTER = re.compile(r"(^|_)(router|gate)$")
_ROUTER_OF_BLOCK = re.compile(r"^(router|gate)$")


@dataclass(frozen=True)
class ExpertLayer:
    """A linear layer that every expert of a module has.

    Attributes:
        name: Its name within an expert.
        fused: The 3-D parameter of the model that holds its matrices.
        shape: [rows, columns], which is [outputs, inputs].
        transposed: Whether the checkpoint holds it as [columns, rows].
        has_bias: Whether it has a bias.
    """

    name: str
    fused: str
    shape: tuple[int, int]
    transposed: bool
    has_bias: bool

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the matrix as the checkpoint holds it."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return ("weight", "bias") if self.has_bias else ("weight",)

    def build(self) -> nn.Module:
        """Return the layer, with its parameters on the meta device."""
        rows, columns = self.shape
        if not self.transposed:
            return nn.Linear(columns, rows, self.has_bias, device="meta")
        with torch.device("meta"):
            layer = Conv1D(rows, columns)
        if not self.has_bias:
            # Conv1D adds one in any case; a buffer of zeros is in no checkpoint.
            del layer.bias
            layer.register_buffer("bias", torch.zeros(rows), persistent=False)
        return layer


@dataclass(frozen=True)
class ExpertLayers:
    """The linear layers of all experts of a module.

    Attributes:
        count: Number of experts.
        layers: Those of each expert, in the order of computation: the first ones get
            the expert's input, and the last one what is made of their outputs.
    """

    count: int
    layers: tuple[ExpertLayer, ...]

    @classmethod
    def of(
        cls, module: nn.Module, parts: Mapping[str, Sequence[str]]
    ) -> "ExpertLayers":
        """Return the layers of a module of experts.

        Args:
            module: A module that `experts_in` found.
            parts: Name of a 3-D parameter -> names of the layers whose matrices it
                joins, in order; the parameter's own name where it is missing.
        """
        traits = experts_traits(module)
        assert traits is not None, "no module of experts"
        layers: list[ExpertLayer] = []
        for name, parameter in fused_parameters(module).items():
            names = parts.get(name) or [name]
            layers += _split(name, parameter, names, traits)
        return cls(len(fused_parameters(module)[_LAST]), tuple(layers))

    def paths(self, layer: ExpertLayer) -> Iterator[str]:
        """Yield the path of a layer within the module, expert by expert."""
        for number in range(self.count):
            yield f"{number}.{layer.name}"


def _split(
    fused: str, parameter: Tensor, names: Sequence[str], traits: ExpertsTraits
) -> Iterator[ExpertLayer]:
    """Yield the layers whose matrices a 3-D parameter joins."""
    _, first, second = parameter.shape
    rows, columns = (second, first) if traits.is_transposed else (first, second)
    for name in names:
        shape = (rows // len(names), columns)
        yield ExpertLayer(name, fused, shape, traits.is_transposed, traits.has_bias)


def experts_in(module: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, for each module within one that holds experts."""
    return {
        path: inner
        for path, inner in module.named_modules()
        if experts_traits(inner) is not None and _LAST in fused_parameters(inner)
    }


def fused_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the 3-D parameters of a module of experts, in the order of their use."""
    named = dict(module.named_parameters(recurse=False))
    return {
        name: named[name]
        for name in _FUSED
        if name in named and named[name].dim() == _FUSED_DIMENSIONS
    }


def fused_leaf(leaf: str) -> tuple[str, str]:
    """Return the 3-D parameter and `weight` or `bias`, for a parameter of experts."""
    name = leaf.removesuffix(_BIAS)
    return name, "weight" if name == leaf else "bias"


def refuse_unknown_experts(block: nn.Module, name: str) -> None:
    """Raise UnsupportedModelError if a block holds experts of a form not known here.

    Args:
        block: A block, its experts as the model has them.
        name: The block's name, for the error.
    """
    known = experts_in(block)
    for path, parameter in block.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = block.get_submodule(owner)
        if owner in known:
            if fused_leaf(leaf)[0] not in fused_parameters(module):
                raise _unknown(block, name, path, parameter)
            continue
        # By name: convolutions, the gates of RecurrentGemma and the mixing weights of
        # RWKV have three dimensions as well. They are left dense.
        inside = any(path.startswith(f"{inner}.") for inner in known)
        by_name = "Experts" in type(module).__name__ or "experts" in path.split(".")
        if by_name and not inside:
            raise _unknown(block, name, path, parameter)


def _unknown(
    block: nn.Module, name: str, path: str, parameter: Tensor
) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Block {name} ({type(block).__name__}) holds experts in a form that Halve "
        f"does not know ({path}, {list(parameter.shape)}): it looks for gate_up_proj "
        "or up_proj, and down_proj, in a class that use_experts_implementation of "
        "transformers decorates.",
        "Open an issue that names the model.",
    )


def is_router(
    path: str, module: nn.Module, experts: Mapping[str, ExpertLayers]
) -> bool:
    """Whether a linear layer routes tokens to experts, or gates a shared expert.

    It does where it lies beside experts in a child named router or gate; or directly
    beside them with one row, or as many rows as there are experts. (The first matrix of
    a shared expert may have as many rows: Qwen3-Next has 512 experts, and shared ones
    of width 512.)

    Args:
        path: Its path within a block.
        module: The layer.
        experts: Path of a module of experts within the block -> its layers.
    """
    return any(
        _is_beside(path, module, home, layers.count)
        for home, layers in (
            (inner.rpartition(".")[0], layers) for inner, layers in experts.items()
        )
    )


def _is_beside(path: str, module: nn.Module, home: str, count: int) -> bool:
    if home and not path.startswith(f"{home}."):
        return False
    child, _, rest = path.removeprefix(f"{home}.").partition(".")
    if not home:
        return bool(_ROUTER_OF_BLOCK.search(child))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return bool(_ROUTER.search(child)) or (not rest and len(weight) in (1, count))


class Experts(nn.Module):
    """Runs each expert on its tokens, by linear layers of its own.

    The results are those of the model's own loop over experts, to the last bit.
    """

    def __init__(self, family: nn.Module, layers: ExpertLayers) -> None:
        """Replace a module of experts.

        Args:
            family: The module, of one of transformers' classes. Its gate, activation
                and norm are used; its 3-D parameters are not.
            layers: The layers of each expert.
        """
        super().__init__()
        traits = experts_traits(family)
        assert traits is not None, "no module of experts"
        self.traits, self.layers = traits, layers
        # Past nn.Module.__setattr__, which would register it as a submodule.
        self.__dict__["family"] = family
        for name, child in family.named_children():
            self.add_module(name, child)
        for number in range(layers.count):
            expert = nn.ModuleDict({x.name: x.build() for x in layers.layers})
            self.add_module(str(number), expert)
        self.eval().requires_grad_(False)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, width].
            top_k_index: [tokens, k], experts of each token; a number past the last
                expert stands for none.
            top_k_weights: [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number < self.layers.count:
                self.add(number, output, hidden_states, top_k_index, top_k_weights)
        return output

    def add(
        self,
        number: int,
        output: Tensor,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> None:
        """Add an expert's outputs to those of the experts before it; see `forward`.

        Args:
            number: The expert.
            output: [tokens, width].
            hidden_states: [tokens, width].
            top_k_index: [tokens, k].
            top_k_weights: [tokens, k].
        """
        # In the order of the model's own loop, so that sums have the same bits.
        place, token = torch.where(top_k_index.T.eq(number))
        if not len(token):
            return
        result = self.run_expert(number, hidden_states[token])
        weighted = result * top_k_weights[token, place, None]
        output.index_add_(0, token, weighted.to(output.dtype))

    def first_layers(self, number: int) -> nn.ModuleList:
        """Return all layers of an expert but the last."""
        return nn.ModuleList([*self.get_submodule(str(number)).children()][:-1])

    def between(self, first_layers: Iterable[nn.Module], inputs: Tensor) -> Tensor:
        """Return what an expert's last layer gets.

        Args:
            first_layers: Those of the expert, or others of the same shapes.
            inputs: What the expert gets, [tokens, width].

        Returns:
            [tokens, inner width].
        """
        outputs = [layer(inputs) for layer in first_layers]
        joined = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        if self.traits.has_gate:
            return gate_experts(self._family, joined)
        return self._family.act_fn(joined)

    def run_expert(self, number: int, inputs: Tensor) -> Tensor:
        """Return an expert's output, [tokens, width], before it is weighted."""
        *first, last = self.get_submodule(str(number)).children()
        output = last(self.between(first, inputs))
        return self._family.post_expert_norm(output) if self.traits.has_norm else output

    @property
    def _family(self) -> Any:  # noqa: ANN401
        return self.__dict__["family"]


@contextmanager
def unfused(
    block: nn.Module, experts: Mapping[str, ExpertLayers]
) -> Iterator[nn.Module]:
    """Replace a block's modules of experts by `Experts` for a while.

    Args:
        block: A block, its parameters on the meta device.
        experts: Path of a module of experts within the block -> its layers.
    """
    family = {path: block.get_submodule(path) for path in experts}
    for path, layers in experts.items():
        block.set_submodule(path, Experts(family[path], layers))
    try:
        yield block
    finally:
        for path, module in family.items():
            block.set_submodule(path, module)
