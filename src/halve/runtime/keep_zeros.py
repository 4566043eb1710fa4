"""Hold the zeros of a model while others train it.

Three places let a zero move: the gradient, an optimizer's step (weight decay leaves a
zero alone, but momentum that was gathered before moves it), and whatever writes weights
beside the optimizer, such as merging an adapter. Each has its hook.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from halve.errors import HalveError, HalveWarning

# What FSDP, torch.compile and checkpointing put into the paths of a model.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class HeldWeight:
    """A weight whose zeros are held.

    Attributes:
        layer: The module that has it.
        leaf: Its name there.
        zeros: True where it stays zero, of the weight's shape.
    """

    layer: nn.Module
    leaf: str
    zeros: Tensor

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module has it now: wrappers replace parameters."""
        return getattr(self.layer, self.leaf)

    def apply(self) -> None:
        """Set the held weights to zero, in place; warn if only a part is here."""
        if self.weight.shape == self.zeros.shape:
            set_zeros(self.weight, self.zeros)
            return
        warnings.warn(
            "Weights are divided among processes, so their zeros are not held by "
            "themselves; call KeptZeros.apply(model) after each step, as its "
            "documentation shows.",
            HalveWarning,
            stacklevel=2,
        )


@torch.no_grad()
def set_zeros(tensor: Tensor, zeros: Tensor) -> None:
    """Set elements of a tensor to zero, in place."""
    tensor.masked_fill_(zeros.to(tensor.device), 0)


def _clear_gradient(weight: Tensor, zeros: Tensor) -> None:
    """Set the gradient of zeros to zero, if the whole weight is here."""
    if weight.grad is not None and weight.grad.shape == zeros.shape:
        set_zeros(weight.grad, zeros)


@dataclass
class KeptZeros:
    """The zeros of a model, held until `remove` is called.

    Attributes:
        held: Name of each weight in the model -> the weight.
    """

    held: dict[str, HeldWeight]
    _handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of zeros that are held."""
        return sum(int(each.zeros.sum()) for each in self.held.values())

    def apply(self, model: nn.Module | None = None) -> None:
        """Set all held weights to zero.

        To be called after an optimizer's step where FSDP1 or DeepSpeed divide weights
        among processes, while full weights are gathered: within
        `FSDP.summon_full_params(model, writeback=True)`, or
        `deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)`.

        Args:
            model: The model as it was wrapped, whose parameters are found by name; by
                default the modules themselves are asked for their weights.

        Raises:
            HalveError: A weight is missing in `model`, or only a part of it is there.
        """
        if model is None:
            for each in self.held.values():
                each.apply()
            return
        parameters = {_plain(n): p for n, p in model.named_parameters()}
        for name, each in self.held.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != each.zeros.shape:
                raise HalveError(
                    f"{name} is not in the model that was passed, or not as a whole.",
                    "Gather the parameters first, with FSDP.summon_full_params or "
                    "deepspeed.zero.GatheredParameters.",
                )
            set_zeros(parameter.data, each.zeros)

    def remove(self) -> None:
        """Remove all hooks: weights may change freely from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hold(self) -> None:
        for each in self.held.values():
            self._hold_gradient(each)
            # It refers to this object, which therefore lives as long as the model ...
            hook = each.layer.register_state_dict_pre_hook(
                lambda *_, kept=self, each=each: each.apply()
            )
            self._handles.append(hook)
        # ... and no longer, though the hook of all optimizers outlives both.
        after_step = WeakMethod(self._after_step)
        self._handles.append(
            register_optimizer_step_post_hook(
                lambda optimizer, *_: _call(after_step, optimizer)
            )
        )

    def _hold_gradient(self, each: HeldWeight) -> None:
        """Set the gradient of zeros to zero, which clipping by norm would count."""
        if each.weight.requires_grad:
            hook = each.weight.register_post_accumulate_grad_hook(
                lambda weight, zeros=each.zeros: _clear_gradient(weight, zeros)
            )
            self._handles.append(hook)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for each in self.held.values():
            if id(each.weight) in stepped:
                each.apply()

    def __enter__(self) -> "KeptZeros":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _call(method: WeakMethod[Any], optimizer: torch.optim.Optimizer) -> None:
    """Call a method unless its object is gone."""
    bound = method()
    if bound is not None:
        bound(optimizer)


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Hold the zeros of a pruned model's matrices under any optimizer.

    Every weight of two or more dimensions is held that has zeros and other values,
    except for embeddings: the matrices that `halve prune` pruned, whichever they are. A
    weight that is all zeros, such as half of a new LoRA adapter, is free to move.

    Their zeros get no gradient, are set again after each step of any optimizer of torch
    that has them among its parameters, and before the state of the model is saved:
    what was merged into a weight in the meantime leaves them zero. Weights may be on
    several devices, in DistributedDataParallel, and divided by `fully_shard` (FSDP2)
    if that was called before; for those that FSDP1 or DeepSpeed divides see
    `KeptZeros.apply`.

    Args:
        model: Any model of torch, before or after an optimizer is made for it.

    Returns:
        What holds them; a context manager whose end lets go.

    Raises:
        HalveError: There is no such weight.

    Cost:
        A byte of memory for each weight, and a pass over them for each step.
    """
    held = {name: each for name, each in _sparse_weights(model)}
    if not held:
        raise HalveError(
            f"No matrix of {type(model).__name__} has zeros to hold.",
            "Pass a model that was pruned and is not packed.",
        )
    kept = KeptZeros(held)
    kept._hold()
    return kept


def _sparse_weights(model: nn.Module) -> Iterable[tuple[str, HeldWeight]]:
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            continue
        for leaf, weight in _own_weights(layer):
            zeros = weight.detach() == 0
            if zeros.any() and not zeros.all():
                name = _plain(f"{path}.{leaf}" if path else leaf)
                yield name, HeldWeight(layer, leaf, zeros)


def _own_weights(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for leaf, weight in layer.named_parameters(recurse=False):
        if weight.dim() > 1 and weight.is_floating_point():
            yield leaf, weight


def _plain(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")  # of DistributedDataParallel, and DeepSpeed
