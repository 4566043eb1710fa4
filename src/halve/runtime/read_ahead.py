"""Read the tensors of the next block in a thread, while the present one is pruned."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Read = Callable[[list[str]], dict[str, Tensor]]


class ReadAhead:
    """Tensors that are read in a thread before they are asked for.

    At most one set of tensors is read ahead, and it stays in memory until it is taken
    or another one is asked for.
    """

    def __init__(self, read: Read, device: torch.device) -> None:
        """Start nothing yet.

        Args:
            read: Returns tensors by name; called in the thread.
            device: Where the tensors will be copied to. For CUDA they are put into
                page-locked memory, from which they are copied at full speed.
        """
        self._read = read
        self._pins = device.type == "cuda"
        initializer = _device_setter(device) if self._pins else None
        # One thread: two readers would only take turns at the disk.
        self._pool = ThreadPoolExecutor(1, "halve-read-ahead", initializer)
        self._ahead: tuple[list[str], Future[dict[str, Tensor]]] | None = None

    def start(self, names: list[str]) -> None:
        """Begin to read some tensors, unless these are being read already."""
        if self._ahead is None or self._ahead[0] != names:
            self.drop()
            self._ahead = names, self._pool.submit(self._load, names)

    def take(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors, read ahead or now.

        Raises:
            CheckpointError: Whatever reading them raised, in the thread or now.
        """
        if self._ahead is None or self._ahead[0] != names:
            return self._read(names)
        _, future = self._ahead
        self._ahead = None
        return future.result()

    def drop(self) -> None:
        """Forget what was read ahead, which frees it once it has been read."""
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None

    def close(self) -> None:
        """Forget what was read ahead, and end the thread once it has read it."""
        self.drop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self._read(names)
        if self._pins:
            for name in names:  # one by one, so that each copy is freed
                tensors[name] = pinned(tensors[name])
        return tensors


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in page-locked memory; itself where there is too little of it."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


def _device_setter(device: torch.device) -> Callable[[], None]:
    """Return what makes a thread use the present GPU: a new one would use the first."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return lambda: torch.cuda.set_device(index)
