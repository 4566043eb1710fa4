"""A mixture's module of experts whose matrices stay packed, or are dense one by one.

It takes the place of the module of transformers. Tokens are sorted by expert, and each
expert multiplies its own once; what is between its layers is computed for all tokens
together, by the gate or the activation of the family's own class, so no family has code
here. Outside autograd the whole module is one operator, `halve::packed_experts`, inside
which an expert may have any number of tokens: `torch.compile` sees one opaque node of
known shape.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve._compat.transformers import experts_traits, gate_experts
from halve.formats import slice_module
from halve.models import ExpertLayer, ExpertLayers
from halve.runtime.cpu.kernels import kernels, supports
from halve.runtime.cpu.operations import Product, multiply_all
from halve.runtime.cpu.operators import library
from halve.runtime.cpu.packed_linear import PackedLinear

library.define(
    "packed_experts(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, "
    "int handle) -> Tensor"
)
# Handle -> module. Operators take tensors and numbers, and the thousands of tensors of
# all experts would be arguments of a model's compiled graph.
_by_handle: "WeakValueDictionary[int, PackedExperts]" = WeakValueDictionary()
_handles = count()
_WEIGHT, _BIAS = "weight", "bias"
# Choices that are computed together, at least: with fewer, calls from Python would cost
# more than they compute; with more, what is between products would leave the cache.
_PART = 256
# Experts, each with the positions of its tokens among those that are computed together.
Runs = list[tuple[int, slice]]


class PackedExperts(nn.Module):
    """Runs each expert on its tokens by its own matrices, packed or dense.

    Its layers are named as the checkpoint names them. Where that has a tensor for each
    matrix, layer `gate_proj` of expert 3 is the submodule `3.gate_proj`; where it has
    one for all experts, `gate_up_proj[3]` if each slice is packed, and otherwise the
    parameter `gate_up_proj`, as in the family's class. Biases of all experts in one
    tensor are such a parameter, too.

    Attributes:
        layers: The linear layers of each expert.
        stacked: Names of the layers whose matrices are slices of one tensor.
        handle: Number of the module, by which its operator finds it.
        reads_routing: Whether it waits for the router to say which experts run, which
            no CUDA graph can.
    """

    reads_routing = True

    def __init__(
        self, family: nn.Module, layers: ExpertLayers, stacked: Collection[str]
    ) -> None:
        """Replace a module of experts; `add_layer` and `add_stack` follow.

        Args:
            family: The module, of one of transformers' classes, whose parameters have
                no values yet.
            layers: The layers of each expert.
            stacked: See the attribute.
        """
        super().__init__()
        traits = experts_traits(family)
        assert traits is not None, "no module of experts"
        self.traits, self.layers, self.stacked = traits, layers, frozenset(stacked)
        # Past nn.Module.__setattr__, which would register it as a submodule.
        self.__dict__["family"] = family
        for name, child in family.named_children():
            self.add_module(name, child)
        for number in range(layers.count):
            if len(self.stacked) < len(layers.layers):
                self.add_module(str(number), nn.Module())
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or pickled state, as a module with a handle of its own."""
        super().__setstate__(state)
        self._register()

    def layer_path(self, layer: ExpertLayer, number: int) -> str:
        """Return the path of an expert's layer within the module."""
        if layer.name in self.stacked:
            return slice_module(layer.name, number)
        return f"{number}.{layer.name}"

    def add_layer(self, layer: ExpertLayer, number: int, module: nn.Module) -> None:
        """Add a linear layer of an expert."""
        owner, _, name = self.layer_path(layer, number).rpartition(".")
        self.get_submodule(owner).add_module(name, module)

    def add_stack(self, name: str) -> None:
        """Add a parameter of all experts as the family's class has it."""
        self.register_parameter(name, self.family.get_parameter(name))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, width].
            top_k_index: [tokens, k], experts of each token; a number past the last
                expert stands for none.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, width], in the dtype of `hidden_states`. The outputs of a token's
            experts are added before they are rounded, as by transformers' `grouped_mm`.
        """
        if self._wants_gradient(hidden_states, top_k_weights):
            return self.run(hidden_states, top_k_index, top_k_weights)
        return packed_experts(hidden_states, top_k_index, top_k_weights, self.handle)

    def _wants_gradient(self, *tensors: Tensor) -> bool:
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*tensors, *self.parameters())
        )

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute what `forward` returns; see there."""
        experts_per_token = index.shape[1]
        chosen, order = index.flatten().sort(stable=True)
        scale = weights.flatten()[order, None]
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        # Choices of no expert stay zero.
        weighted = hidden.new_zeros(index.numel(), hidden.shape[1], dtype=dtype)
        for runs in _parts(_runs(chosen, self.layers.count)):
            start, stop = runs[0][1].start, runs[-1][1].stop
            some = order[start:stop]
            own = [(n, slice(r.start - start, r.stop - start)) for n, r in runs]
            outputs = self._outputs(own, hidden[some // experts_per_token])
            weighted.index_copy_(0, some, (outputs * scale[start:stop]).to(dtype))
        return weighted.view(*index.shape, -1).sum(1).to(hidden.dtype)

    def _outputs(self, runs: Runs, inputs: Tensor) -> Tensor:
        """Return the outputs of some experts for their inputs, [choices, width]."""
        first = self._multiply(self.layers.layers[:-1], runs, inputs)
        joined = torch.cat(first, dim=-1) if len(first) > 1 else first[0]
        if self.traits.has_gate:
            inner = gate_experts(self.family, joined)
        else:
            inner = self.family.act_fn(joined)
        (outputs,) = self._multiply(self.layers.layers[-1:], runs, inner)
        return (
            self.family.post_expert_norm(outputs) if self.traits.has_norm else outputs
        )

    def _multiply(
        self, layers: Sequence[ExpertLayer], runs: Runs, inputs: Tensor
    ) -> list[Tensor]:
        """Return for each layer the outputs of all experts, in the order of inputs."""
        together = self._multiply_together(layers, runs, inputs)
        if together is not None:
            return together
        return [
            torch.cat([self._product(x, n, inputs[rows]) for n, rows in runs])
            for x in layers
        ]

    def _multiply_together(
        self, layers: Sequence[ExpertLayer], runs: Runs, inputs: Tensor
    ) -> list[Tensor] | None:
        """Return the same from one call of the kernels; None if they cannot do it.

        Each product by itself wakes the threads, which costs as much as a token's
        product with a small matrix.
        """
        kernel = kernels() if _run_together(inputs) else None
        if kernel is None:
            return None
        inputs = inputs.contiguous()
        outputs = [inputs.new_empty(len(inputs), x.shape[0]) for x in layers]
        products = (
            Product(self._module(x, n), inputs[rows], y[rows], self._bias(x, n))
            for x, y in zip(layers, outputs, strict=True)
            for n, rows in runs
        )
        return outputs if multiply_all(kernel, products) else None

    def _module(self, layer: ExpertLayer, number: int) -> nn.Module | None:
        """Return the module of a layer of an expert; None if it is a slice."""
        if layer.name not in self.stacked:
            return getattr(getattr(self, str(number)), layer.name)
        return getattr(self, slice_module(layer.name, number), None)

    def _bias(self, layer: ExpertLayer, number: int) -> Tensor | None:
        """Return the bias of a layer of an expert."""
        if layer.name not in self.stacked:
            return getattr(self._module(layer, number), _BIAS)
        biases = getattr(self, f"{layer.fused}_{_BIAS}", None)
        return None if biases is None else biases[number]

    def _product(self, layer: ExpertLayer, number: int, inputs: Tensor) -> Tensor:
        """Return the outputs of a layer of one expert."""
        module = self._module(layer, number)
        bias = self._bias(layer, number)
        if isinstance(module, PackedLinear):
            return module(inputs, bias)
        if module is None:
            weight = getattr(self, layer.fused)[number]
            weight = weight.T if layer.transposed else weight
            return functional.linear(inputs, weight, bias)
        # Dense, as `halve bench` compares it.
        own = layer.name not in self.stacked
        return module(inputs) if own or bias is None else module(inputs) + bias

    @property
    def family(self) -> Any:  # noqa: ANN401
        """The module that was replaced; its parameters have no values."""
        return self.__dict__["family"]

    @property
    def is_supported(self) -> bool:
        """Whether all matrices should stay packed; see `PackedLinear.is_supported`."""
        return all(
            m.is_supported for m in self.modules() if isinstance(m, PackedLinear)
        )

    def to_dense(self) -> nn.Module:
        """Return the family's module, with the matrices of all experts dense."""
        own = dict(self.named_parameters(recurse=False))
        for name in dict(self.family.named_parameters(recurse=False)):
            value = own[name] if name in own else self._fused(name)
            self.family.register_parameter(name, value)
        return self.family

    def _fused(self, parameter: str) -> nn.Parameter:
        """Return a parameter of all experts, made of those of their layers."""
        joined = [x for x in self.layers.layers if parameter.startswith(x.fused)]
        kind = _BIAS if parameter not in {x.fused for x in joined} else _WEIGHT
        values: Tensor | None = None
        for number in range(self.layers.count):
            parts = [self._dense(layer, number, kind) for layer in joined]
            value = torch.cat(parts)
            if kind == _WEIGHT and joined[0].transposed:
                value = value.T
            if values is None:
                values = value.new_empty(self.layers.count, *value.shape)
            values[number] = value
        assert values is not None
        return nn.Parameter(values, requires_grad=False)

    def _dense(self, layer: ExpertLayer, number: int, kind: str) -> Tensor:
        """Return the weight of a layer of one expert, [rows, columns], or its bias."""
        module: Any = self.get_submodule(self.layer_path(layer, number))
        if kind == _BIAS:
            return module.bias
        if isinstance(module, PackedLinear):
            return module.dense_weight()
        return module.weight.T if layer.transposed else module.weight

    def extra_repr(self) -> str:
        """Show the number of experts and the shapes of their layers."""
        shapes = ", ".join(f"{x.name}={list(x.shape)}" for x in self.layers.layers)
        return f"{self.layers.count}, {shapes}"


def _run_together(inputs: Tensor) -> bool:
    """Whether products of some inputs can be computed in one call."""
    return (
        inputs.device.type == "cpu"
        and supports(inputs.dtype)
        and not torch.is_grad_enabled()  # a bias may want a gradient
        and not torch.is_autocast_enabled("cpu")
    )


def _runs(chosen: Tensor, experts: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has tokens, and their positions.

    Args:
        chosen: Experts in ascending order.
        experts: Number of experts; choices past the last one are left out.
    """
    numbers, counts = torch.unique_consecutive(chosen, return_counts=True)
    start = 0
    for number, size in zip(numbers.tolist(), counts.tolist(), strict=True):
        if number < experts:
            yield number, slice(start, start + size)
        start += size


def _parts(runs: Iterable[tuple[int, slice]]) -> Iterator[Runs]:
    """Yield consecutive runs that are computed together."""
    part: Runs = []
    for run in runs:
        part.append(run)
        if run[1].stop - part[0][1].start >= _PART:
            yield part
            part = []
    if part:
        yield part


def _packed_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> Tensor:
    with torch.no_grad():
        return _by_handle[handle].run(hidden_states, top_k_index, top_k_weights)


def _packed_experts_fake(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> Tensor:
    return torch.empty_like(hidden_states)


library.impl("packed_experts", _packed_experts, "CompositeExplicitAutograd")
torch.library.register_fake("halve::packed_experts", _packed_experts_fake, lib=library)
packed_experts = torch.ops.halve.packed_experts.default


def packed_experts_in(model: nn.Module) -> dict[str, PackedExperts]:
    """Return path -> module, for each module of packed experts in a model."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts)
    }
