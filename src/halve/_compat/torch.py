"""Private or undocumented parts of torch; tested with torch 2.7 to 2.13."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store  # noqa: TID251
from torch.distributed.rendezvous import rendezvous  # noqa: TID251

# `Store`: the base class of torch.distributed's key-value stores, for annotations.
# torch.distributed has it, but does not declare it as exported.
__all__ = [
    "Store",
    "buffer_slots",
    "change_class",
    "has_hooks",
    "join_store",
    "multiplies_bfloat16",
    "onednn_linear",
    "parameter_slots",
    "share_state",
    "tensor_version",
]


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16.

    Private: `torch.cpu._is_avx512_bf16_supported` and `_is_amx_tile_supported`. When
    they break: return False, and training passes take longer.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `inputs @ weight.T + bias` by oneDNN, whatever torch would choose.

    Private: `torch.ops.mkldnn._linear_pointwise`, the operator to which torch.compile
    lowers linear layers on a CPU. When it breaks: return `functional.linear`, which is
    correct, and measure what is lost (docs/log.md, "oneDNN for float32").

    Args:
        inputs: [..., columns], float32 or bfloat16, on the CPU, contiguous: oneDNN
            falls back to a reference kernel, hundreds of times slower, on strided
            operands.
        weight: [rows, columns], as `inputs`.
        bias: [rows], or None.

    Returns:
        [..., rows]. It has no derivatives.
    """
    # No operation is fused after the product: "none", without arguments.
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def tensor_version(tensor: Tensor) -> int:
    """Return how often a tensor's storage has been written to in place.

    Private: `Tensor._version`, autograd's counter. When it breaks: return 0. Then two
    modules that read the same memory before and after an in-place change are taken for
    a group with a common input.
    """
    return tensor._version


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, to be replaced in place.

    Private: `Module._parameters`. It includes parameters that are None, and assigning
    to an entry skips the checks of `setattr`. When it breaks: use
    `setattr` and `named_parameters(recurse=False)`.
    """
    return module._parameters


def buffer_slots(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to be replaced in place.

    Private: `Module._buffers`. When it breaks: as `parameter_slots`.
    """
    return module._buffers


def share_state(module: nn.Module, source: nn.Module) -> None:
    """Make a module use the parameters, buffers and attributes of another.

    Undocumented: all of a module's state is in its `__dict__`; parameters and buffers
    are dicts there, which both modules then share. When it breaks: assign `weight` and
    `bias` one by one.
    """
    module.__dict__ |= source.__dict__


def change_class(module: nn.Module, subclass: type[nn.Module]) -> None:
    """Turn a module into one of a subclass, in place.

    Undocumented: nn.Module allows assignment to `__class__`, provided that the subclass
    adds no state. When it breaks: build the subclass and replace the module in its
    parent by `set_submodule`.
    """
    module.__class__ = subclass


def has_hooks(module: nn.Module) -> bool:
    """Whether anything beside `forward` is called when a module is.

    Private: `Module._forward_hooks` and `Module._forward_pre_hooks`; accelerate's hooks
    replace `forward` in the instance. When it breaks: return True, and models decode
    as transformers has them decode.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def join_store() -> tuple[Store, int, int]:
    """Connect to the store that torchrun provides.

    Undocumented: `torch.distributed.rendezvous`, by which `init_process_group` itself
    finds its store. When it breaks: build a `TCPStore` from MASTER_ADDR and
    MASTER_PORT, with `is_master` for rank 0 unless TORCHELASTIC_USE_AGENT_STORE is set.

    Returns:
        The store, the rank of this process, and the number of processes.
    """
    return next(rendezvous("env://"))
