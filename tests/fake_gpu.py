"""A GPU that is not there: tensors on the CPU that say they are on CUDA.

Within `fake_gpu` every tensor has a device, that of its storage. What is made with
`device="cuda"`, or from tensors there, says `cuda:0`, so that the code for GPUs runs;
it is computed on the CPU. As on a real GPU, an operation on tensors of two devices
raises RuntimeError, unless one of them is a scalar or an index, and numpy cannot read
what is on the GPU. What makes the host wait for the GPU is counted.

Not imitated: how much memory is taken, streams, pinned memory, the results of CUDA's
own algorithms, and what does not pass through torch's operators, as Triton's kernels
(which its interpreter runs).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
_aten = torch.ops.aten
# Operators whose tensors may be on two devices.
_ACROSS = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
# Operators whose result the host needs before it can go on.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
_IS_CUDA: Any = Tensor.is_cuda
_NUMPY = {Tensor.numpy, Tensor.__array__}


class Devices:
    """The device of every storage that has been seen; any other is on the CPU."""

    def __init__(self) -> None:
        # A weak reference keeps the address of a storage from being used again.
        self._known: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        """Return where a tensor is said to be."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[1] if known else tensor.device

    def knows(self, tensor: Tensor) -> bool:
        """Whether the device of a tensor's storage is decided."""
        return tensor.untyped_storage()._cdata in self._known

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Say where a tensor is."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), device)
        return tensor


class _Operators(TorchDispatchMode):
    """Gives results the device of the operands, which must be the same."""

    def __init__(self, devices: Devices, waits: Counter[str]) -> None:
        super().__init__()
        self._devices, self._waits = devices, waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = [self._devices.of(x) for x in operands]
        name = func._schema.name.partition("::")[2]
        arrays = {p for p, x in zip(places, operands, strict=True) if x.dim()}
        if len(arrays) > 1 and name not in _ACROSS:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} got "
                f"{sorted(map(str, arrays))}"
            )
        if GPU in places and name in _WAITING:
            self._waits[name] += 1
        result = func(*args, **kwargs)
        place = (arrays or set(places) or {CPU}).pop() if len(arrays) < 2 else places[0]
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not self._devices.knows(made):
                self._devices.put(made, place)
        return result


class _Functions(TorchFunctionMode):
    """Answers where tensors are, and moves them."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        for known, answer in self._answers:
            if func == known:
                return answer(args[0])
        if func in _NUMPY and self._devices.of(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        args, device = _without_device(func, args, kwargs)
        if device is None or device.type == "meta":
            return func(*args, **kwargs)
        if func is Tensor.to:
            kwargs.pop("device", None)
            return self._to(device, *args, **kwargs)
        made = func(*args, **{**kwargs, "device": CPU})
        return self._devices.put(made, _whole(device))

    @property
    def _answers(self) -> list[tuple[Any, Callable[[Tensor], Any]]]:
        """Functions of one tensor, and what takes their place."""
        of = self._devices.of
        return [
            (Tensor.device.__get__, of),
            (_IS_CUDA.__get__, lambda tensor: of(tensor) == GPU),
            (Tensor.get_device, lambda tensor: 0 if of(tensor) == GPU else -1),
            (Tensor.cpu, lambda tensor: self._move(tensor, CPU)),
            (Tensor.cuda, lambda tensor: self._move(tensor, GPU)),
        ]

    def _to(
        self,
        device: torch.device,
        tensor: Tensor,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        **options: Any,
    ) -> Tensor:
        """Imitate `Tensor.to` with a device."""
        moved = self._move(tensor, device)
        copy = copy and moved is tensor
        return moved.to(dtype or tensor.dtype, copy=copy, **options)

    def _move(self, tensor: Tensor, device: torch.device) -> Tensor:
        if self._devices.of(tensor) == _whole(device):
            return tensor
        return self._devices.put(tensor.clone(), _whole(device))


def _without_device(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> tuple[Any, torch.device | None]:
    """Take the device out of the arguments of a function, if it is given one."""
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
        return (args[0], *args[2:]), torch.device(args[1])
    if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
        raise NotImplementedError("to(other)")
    device = kwargs.get("device")
    return args, None if device is None else torch.device(device)


def _whole(device: torch.device) -> torch.device:
    return GPU if device.type == "cuda" else device


_MEMORY = 8 * 2**30
# What would initialize CUDA.
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_of": lambda _: nullcontext(),
    "set_device": lambda _: None,
    "synchronize": lambda _: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda _: "a GPU that is not there",
    "get_device_properties": lambda _: SimpleNamespace(total_memory=_MEMORY),
    "mem_get_info": lambda _: (_MEMORY, _MEMORY),
    "memory_reserved": lambda _: 0,
    "memory_allocated": lambda _: 0,
}


@contextmanager
def fake_gpu() -> Iterator[Counter[str]]:
    """Let there be a GPU within this context.

    Yields:
        How often the host has waited for it, by operator.
    """
    devices, waits = Devices(), Counter[str]()
    cuda = patch.multiple("torch.cuda", **_CUDA)
    with cuda, _Operators(devices, waits), _Functions(devices):
        yield waits
