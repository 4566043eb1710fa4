"""A model run block by block, with one block's weights in memory at a time.

`BlockwiseModel` joins a skeleton with a checkpoint. Everything is computed in float32
whatever the dtype of the checkpoint.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halve.checkpoint import Checkpoint
from halve.errors import (
    HalveError,
    NumericalError,
    UnsupportedModelError,
)
from halve.models import (
    MetaModel,
    StoredTensor,
    build_meta_model,
    is_plain,
    match_names,
)
from halve.numerics.finite import is_finite
from halve.numerics.matmul import NARROW

_DEVICES = ("cpu", "cuda")
# Enough tokens to keep the cores busy, few enough for the widest activations.
BATCH_TOKENS = 1024


def windows_per_batch(length: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """Return how many windows of a length run through a model at once."""
    return max(batch_tokens // length, 1)


def loaded_dtype(stored: torch.dtype, widen: bool) -> torch.dtype:
    """Return the dtype in which a tensor of the checkpoint lies in memory.

    Args:
        stored: Its dtype in the checkpoint.
        widen: False for matrices of plain linear layers in a block and for embeddings
            in which rows are looked up: where those have 16 bits, they keep them.
    """
    if not stored.is_floating_point or (stored in NARROW and not widen):
        return stored
    return torch.float32


def choose_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        HalveError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in _DEVICES:
        raise HalveError(
            f"{name!r} is not a device that Halve runs on.",
            f"Use --device auto, {' or '.join(_DEVICES)}.",
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HalveError(
            f"The device {name!r} cannot be used here "
            f"({str(error).splitlines()[0][:120]}).",
            "Use --device auto or --device cpu.",
        ) from error
    return device


@dataclass(frozen=True)
class BlockwiseModel:
    """A checkpoint that is run one block at a time.

    Attributes:
        checkpoint: Where the tensors lie.
        meta_model: The model without them.
        tensors: Parameter or buffer -> tensor of the checkpoint.
        device: Where it runs.
        batch_tokens: How many tokens run through it at once, if one window has no more.
    """

    checkpoint: Checkpoint
    meta_model: MetaModel
    tensors: dict[str, str]
    device: torch.device
    batch_tokens: int = BATCH_TOKENS

    @classmethod
    def open(
        cls, folder: Path, device: str = "auto", trust_remote_code: bool = False
    ) -> "BlockwiseModel":
        """Read config and headers; no tensor is read.

        Raises:
            UnsupportedModelError: No causal language model, or one of no known shape.
            CheckpointError: Damaged files, or tensors that contradict the config.
        """
        meta_model = build_meta_model(folder, trust_remote_code)
        checkpoint = Checkpoint.open(folder)
        infos = checkpoint.tensors.values()
        tensors = match_names(
            meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
        )
        return cls(checkpoint, meta_model, tensors, choose_device(device))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.meta_model.blocks)

    def batch(self, length: int) -> int:
        """Return how many windows of a length run through it at once."""
        return windows_per_batch(length, self.batch_tokens)

    def block_name(self, index: int) -> str:
        """Return a block's name, such as `model.layers.3`."""
        return f"{self.meta_model.path}.{index}"

    def own_dtypes(self, block: str) -> dict[str, torch.dtype]:
        """Return the parameters that are a block's alone, and how they are stored.

        What is tied to another name is left out, as are integers.
        """
        uses = Counter(self.tensors.values())
        found: dict[str, torch.dtype] = {}
        for path, _ in self.meta_model.model.get_submodule(block).named_parameters():
            info = self.checkpoint.tensors[self.tensors[f"{block}.{path}"]]
            if uses[info.name] == 1 and info.dtype.is_floating_point:
                found[path] = info.dtype
        return found

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Lend a block with its weights, on the device.

        In float32, but for matrices of 16 bits in plain linear layers: they stay so,
        and `matmul.linear` widens each one when it multiplies.
        """
        prefix, block = self.block_name(index) + ".", self.meta_model.blocks[index]
        layers = [path for path, module in block.named_modules() if is_plain(module)]
        narrow = self._sources(f"{prefix}{path}.weight" for path in layers)
        with self._filled((n for n in self.tensors if n.startswith(prefix)), narrow):
            yield block

    @contextmanager
    def surroundings(self, with_head: bool) -> Iterator[None]:
        """Fill everything outside the blocks, for a while; the head only if asked.

        An embedding in which rows are looked up and no more stays as it is stored: it
        may be the largest tensor of all, and only the rows are computed with.
        """
        blocks = self.meta_model.path + "."
        head = self.meta_model.names_of(self.meta_model.model.get_output_embeddings())
        left = set() if with_head else self._untied(head)
        table = self.meta_model.table
        looked_up = self._sources(self.meta_model.names_of(table))
        with (
            self._filled(
                (n for n in self.tensors if not n.startswith(blocks) and n not in left),
                looked_up - self._sources(head) if with_head else looked_up,
            ),
            _widening(table),
        ):
            yield

    def _sources(self, names: Iterable[str]) -> set[str]:
        return {self.tensors[name] for name in names if name in self.tensors}

    def _untied(self, head: set[str]) -> set[str]:
        """Return what the output head shares with nothing else."""
        shared = self._sources(name for name in self.tensors if name not in head)
        return {n for n in head if self.tensors.get(n) not in shared}

    @contextmanager
    def _filled(
        self, names: Iterable[str], as_stored: Set[str] = frozenset()
    ) -> Iterator[None]:
        """Fill parameters and buffers for a while.

        Args:
            names: Which.
            as_stored: Tensors of the checkpoint that are not widened if of 16 bits.
        """
        wanted = list(names)
        stored = self.checkpoint.read(dict.fromkeys(self.tensors[n] for n in wanted))
        values: dict[str, Tensor] = {}
        empty: dict[str, Tensor | None] = {}
        try:
            for name in wanted:
                source = self.tensors[name]
                if source in stored:
                    widen = source not in as_stored
                    values[source] = self._usable(source, stored.pop(source), widen)
                empty[name] = self._swap(name, values[source])
            values.clear()  # so that a weight is freed once another takes its place
            self._move_buffers()
            yield
        finally:
            for name, placeholder in empty.items():
                self._swap(name, placeholder)

    def _usable(self, name: str, tensor: Tensor, widen: bool) -> Tensor:
        usable = tensor.to(self.device)
        usable = usable.to(loaded_dtype(usable.dtype, widen))
        self.check_finite(name, usable)
        return usable

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise NumericalError where a tensor of the checkpoint is not all numbers."""
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NumericalError(
                f"Tensor {name} of {self.checkpoint.folder} holds NaN or infinity.",
                "Repair or download the checkpoint again; it cannot be computed with.",
            )

    def _swap(self, name: str, value: Tensor | None) -> Tensor | None:
        """Put a value in the place of a parameter or buffer; return what was there."""
        path, _, leaf = name.rpartition(".")
        owner = self.meta_model.model.get_submodule(path)
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            if value is not None and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            owner._parameters[leaf] = value
        else:
            old = owner._buffers[leaf]
            owner._buffers[leaf] = value
        return old

    def _move_buffers(self) -> None:
        """Bring computed buffers (rotary frequencies, masks) to the device."""
        if self.device.type == "cpu":
            return
        for module in self.meta_model.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "cpu":
                    module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Explain what breaks inside a model's own code: mostly a config that lies."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # no fault of the model's; `with_smaller_batches` knows what to do
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as e:
            reason = " ".join(str(e).split())[:160].rstrip(". ")
            raise UnsupportedModelError(
                f"{type(self.meta_model.model).__name__} cannot be run as its config in "
                f"{self.checkpoint.folder} says ({type(e).__name__}: {reason}).",
                "Check config.json; if plain transformers runs it, open an issue.",
            ) from e


@contextmanager
def _widening(table: nn.Embedding | None) -> Iterator[None]:
    """Let what is looked up in an embedding be float32, whatever it is stored in."""
    if table is None:
        yield
        return
    hook = table.register_forward_hook(lambda module, ids, rows: rows.float())
    try:
        yield
    finally:
        hook.remove()
