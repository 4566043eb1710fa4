"""Run a model block by block, with the weights of one block in memory at a time.

`BlockwiseModel` joins a meta model with a checkpoint. All computation is in float32,
whatever the dtype of the checkpoint.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from halve._compat.torch import buffer_slots, parameter_slots
from halve.calibration import spill_weight
from halve.checkpoint import Checkpoint
from halve.devices import choose_device
from halve.errors import NumericalError, UnsupportedModelError
from halve.models import (
    ExpertLayers,
    MetaModel,
    Place,
    StoredTensor,
    build_meta_model,
    is_plain,
    match_names,
    unfused,
)
from halve.numerics.finite import is_finite
from halve.numerics.matmul import HALF_DTYPES
from halve.numerics.precision import FULL_PRECISION
from halve.runtime.batch_size import (
    BATCH_TOKENS,
    activation_nbytes,
    batch_tokens_within,
    windows_per_batch,
)
from halve.runtime.memory_left import gpu_nbytes
from halve.runtime.read_ahead import ReadAhead

# What the code of a model raises where its config contradicts its weights.
_MODEL_ERRORS = (
    *(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError),
    AttributeError,
)


def loaded_dtype(stored: torch.dtype, widen: bool) -> torch.dtype:
    """Return the dtype in which a tensor of the checkpoint lies in memory.

    Args:
        stored: Its dtype in the checkpoint.
        widen: False for matrices of plain linear layers in a block and for embeddings
            in which rows are looked up: where those have 16 bits, they keep them.
    """
    if not stored.is_floating_point or (stored in HALF_DTYPES and not widen):
        return stored
    return torch.float32


@dataclass(frozen=True)
class BlockwiseModel:
    """A checkpoint that is run one block at a time.

    Attributes:
        checkpoint: The checkpoint that holds the tensors.
        meta_model: The model without its weights.
        places: Parameter or buffer -> its place in the checkpoint.
        experts: Path of each module of experts in the model -> its layers.
        device: The device that blocks run on.
        batch_tokens: The number of tokens in a batch, unless one window has more.
        matmul_precision: Of products in blocks on CUDA; see `matmul_precision`.
        reserve: Bytes of a GPU's memory that stay free beside hidden states; None where
            hidden states stay in the memory of the host.
        read_ahead: Reads the tensors of the next block meanwhile; None to read them
            when they are needed.
        spill: Folder of memory-mapped files that hold the weights of a block's experts,
            on the CPU, so that those need not fit in memory; None to hold them there.
    """

    checkpoint: Checkpoint
    meta_model: MetaModel
    places: dict[str, Place]
    experts: dict[str, ExpertLayers]
    device: torch.device
    batch_tokens: int = BATCH_TOKENS
    matmul_precision: str = FULL_PRECISION
    reserve: int | None = None
    read_ahead: ReadAhead | None = None
    spill: Path | None = None

    @classmethod
    def open(
        cls, folder: Path, device: str = "auto", trust_remote_code: bool = False
    ) -> "BlockwiseModel":
        """Read the config and the headers of a checkpoint, but no tensor.

        Raises:
            UnsupportedModelError: It is not a causal language model that Halve
                supports.
            CheckpointError: Files are damaged, or tensors contradict the config.
        """
        meta_model = build_meta_model(folder, trust_remote_code)
        checkpoint = Checkpoint.open(folder)
        infos = checkpoint.tensors.values()
        found = match_names(
            meta_model, [StoredTensor(i.name, i.shape, i.dtype) for i in infos]
        )
        places, experts = found.places, found.experts
        model = cls(checkpoint, meta_model, places, experts, choose_device(device))
        return model._sized_for_gpu() if model.device.type == "cuda" else model

    def _sized_for_gpu(self) -> "BlockwiseModel":
        """Return the model with batches, and room for its blocks, as its GPU allows."""
        tokens = batch_tokens_within(gpu_nbytes(self.device), self.batch_nbytes(1))
        # Twice: what is not a plain linear layer is widened to float32.
        reserve = 2 * self.block_nbytes() + self.batch_nbytes(tokens)
        return replace(self, batch_tokens=tokens, reserve=reserve)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.meta_model.blocks)

    def batch(self, length: int) -> int:
        """Return how many windows of a length run through it at once."""
        return windows_per_batch(length, self.batch_tokens)

    def batch_nbytes(self, tokens: int) -> int:
        """Return about how many bytes the activations of a batch take in a block."""
        sides = (p.shape[-2:] for p in self.meta_model.blocks.parameters())
        widest = max((max(shape, default=0) for shape in sides), default=0)
        scores = self.meta_model.scored_heads * self.meta_model.default_length
        return activation_nbytes(tokens, self.meta_model.width, max(widest, scores))

    def block_nbytes(self) -> int:
        """Return the bytes of the largest block's tensors, as they are stored."""
        return max(
            sum(self.checkpoint.tensors[n].nbytes for n in self.block_tensors(index))
            for index in range(self.depth)
        )

    def block_tensors(self, index: int) -> list[str]:
        """Return the names in the checkpoint of a block's tensors, each once."""
        prefix = self.block_name(index) + "."
        names = (
            place.tensor
            for name, place in self.places.items()
            if name.startswith(prefix)
        )
        return list(dict.fromkeys(names))

    def slices(self, block: str, tensor: str) -> list[tuple[str, Place]]:
        """Return path in a block and place of all slices of a tensor, in their order.

        Args:
            block: The block's name.
            tensor: A tensor that holds all experts of the block.
        """
        prefix = f"{block}."
        found = [
            (name.removeprefix(prefix), place)
            for name, place in self.places.items()
            if place.tensor == tensor and name.startswith(prefix)
        ]
        return sorted(found, key=lambda item: item[1].index or 0)

    def block_name(self, index: int) -> str:
        """Return the name of a block, such as `model.layers.3`."""
        return f"{self.meta_model.path}.{index}"

    def own_dtypes(self, block: str) -> dict[str, torch.dtype]:
        """Return the floating-point parameters that only one block uses, with dtypes.

        Args:
            block: The name of a block that is lent.

        Returns:
            Name within the block -> stored dtype. Tied parameters are left out.
        """
        uses = Counter(self.places.values())
        dtypes: dict[str, torch.dtype] = {}
        for path, _ in self.meta_model.model.get_submodule(block).named_parameters():
            place = self.places[f"{block}.{path}"]
            info = self.checkpoint.tensors[place.tensor]
            if uses[place] == 1 and info.dtype.is_floating_point:
                dtypes[path] = info.dtype
        return dtypes

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Load a block onto the device for the duration of the context.

        Weights are converted to float32, with the exception of 16-bit matrices of
        plain linear layers: `matmul.linear` converts those for each product. Experts
        are linear layers meanwhile (`models.experts`).
        """
        prefix = self.block_name(index) + "."
        names = [name for name in self.places if name.startswith(prefix)]
        with self._unfused(index) as block:
            modules = block.named_modules()
            layers = [path for path, module in modules if is_plain(module)]
            narrow = self._sources(f"{prefix}{path}.weight" for path in layers)
            with self._filled(names, self._read_block(index), narrow):
                if self.read_ahead is not None and index + 1 < self.depth:
                    self.read_ahead.start(self.block_tensors(index + 1))
                yield block

    def _unfused(self, index: int) -> AbstractContextManager[nn.Module]:
        """Replace the experts of a block by linear layers, on the meta device."""
        prefix = self.block_name(index) + "."
        experts = {
            path.removeprefix(prefix): layers
            for path, layers in self.experts.items()
            if path.startswith(prefix)
        }
        return unfused(self.meta_model.blocks[index], experts)

    def _read_block(self, index: int) -> dict[str, Tensor]:
        """Return a block's tensors as they are stored, by their names there."""
        names = self.block_tensors(index)
        if self.read_ahead is not None:
            return self.read_ahead.take(names)
        spilled = self.spilled_tensors(index)
        tensors = self.checkpoint.read(name for name in names if name not in spilled)
        for name in spilled:  # one in memory at a time
            weight = self.checkpoint.read([name])[name]
            tensors[name] = spill_weight(weight, self.spill)
        return tensors

    def spilled_tensors(self, index: int) -> list[str]:
        """Return the tensors of a block's experts if they are spilled, each once."""
        if self.spill is None:
            return []
        prefix = self.block_name(index) + "."
        paths = tuple(f"{p}." for p in self.experts if p.startswith(prefix))
        held = (p.tensor for name, p in self.places.items() if name.startswith(paths))
        return list(dict.fromkeys(held))

    @contextmanager
    def surroundings(self, with_head: bool) -> Iterator[None]:
        """Load everything outside the blocks for the duration of the context.

        An embedding that only looks up rows keeps its stored dtype: it may be the
        largest tensor of the model, and only the rows take part in the computation.

        Args:
            with_head: Whether to load the output head as well.
        """
        blocks = self.meta_model.path + "."
        output = self.meta_model.model.get_output_embeddings()
        head = self.meta_model.parameter_names(output)
        skipped = set() if with_head else self._untied(head)
        embedding = self.meta_model.lookup_embedding
        looked_up = self._sources(self.meta_model.parameter_names(embedding))
        outside = [n for n in self.places if not n.startswith(blocks)]
        names = [name for name in outside if name not in skipped]
        tensors = dict.fromkeys(self.places[name].tensor for name in names)
        with (
            self._filled(
                names,
                self.checkpoint.read(tensors),
                # A tied head multiplies by the embedding, so it needs float32.
                looked_up - self._sources(head) if with_head else looked_up,
            ),
            _float32_rows(embedding),
        ):
            yield

    def _sources(self, names: Iterable[str]) -> set[str]:
        return {self.places[name].tensor for name in names if name in self.places}

    def _untied(self, head: set[str]) -> set[str]:
        """Return the parameters of the output head that are not tied to others."""
        shared = self._sources(name for name in self.places if name not in head)
        return {n for n in head if not self._sources([n]) & shared}

    @contextmanager
    def _filled(
        self, names: list[str], stored: dict[str, Tensor], as_stored: Set[str]
    ) -> Iterator[None]:
        """Give parameters and buffers their values for the duration of the context.

        Args:
            names: The parameters and buffers.
            stored: Their tensors, by their names in the checkpoint; emptied, so that
                each is freed once it has been copied or converted.
            as_stored: Tensors of the checkpoint that keep their dtype if it has 16
                bits; all others are converted to float32.
        """
        values: dict[str, Tensor] = {}
        empty: dict[str, Tensor | None] = {}
        try:
            for name in names:
                place = self.places[name]
                if (source := place.tensor) in stored:
                    widen = source not in as_stored
                    values[source] = self._usable(source, stored.pop(source), widen)
                empty[name] = self._swap(name, place.view(values[source]))
            values.clear()  # a weight that is replaced within the context is then freed
            self._move_buffers()
            yield
        finally:
            for name, placeholder in empty.items():
                self._swap(name, placeholder)

    def _usable(self, name: str, tensor: Tensor, widen: bool) -> Tensor:
        usable = tensor.to(self.device, non_blocking=True)  # where it is pinned
        usable = usable.to(loaded_dtype(usable.dtype, widen))
        self.check_finite(name, usable)
        return usable

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise NumericalError if a tensor of the checkpoint is not finite."""
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NumericalError(
                f"Tensor {name} of {self.checkpoint.folder} holds NaN or infinity.",
                "Repair the checkpoint, or download it again.",
            )

    def _swap(self, name: str, value: Tensor | None) -> Tensor | None:
        """Replace the value of a parameter or buffer; return the previous one."""
        path, _, leaf = name.rpartition(".")
        owner = self.meta_model.model.get_submodule(path)
        parameters, buffers = parameter_slots(owner), buffer_slots(owner)
        if leaf not in parameters:
            previous, buffers[leaf] = buffers[leaf], value
            return previous
        if value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        previous, parameters[leaf] = parameters[leaf], value
        return previous

    def _move_buffers(self) -> None:
        """Move computed buffers (rotary frequencies, masks) to the device."""
        if self.device.type == "cpu":
            return
        for module in self.meta_model.model.modules():
            buffers = buffer_slots(module)
            for name, buffer in buffers.items():
                if buffer is not None and buffer.device.type == "cpu":
                    buffers[name] = buffer.to(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turn errors raised by the model's code into UnsupportedModelError.

        Their usual cause is a config that contradicts the weights.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # handled by `with_smaller_batches`
        except _MODEL_ERRORS as e:
            reason = " ".join(str(e).split())[:160].rstrip(". ")
            raise UnsupportedModelError(
                f"{type(self.meta_model.model).__name__} cannot be run with its config "
                f"in {self.checkpoint.folder} ({type(e).__name__}: {reason}).",
                "Check config.json; if transformers can run the model, open an issue.",
            ) from e


@contextmanager
def _float32_rows(embedding: nn.Embedding | None) -> Iterator[None]:
    """Convert the rows that are looked up in an embedding to float32."""
    if embedding is None:
        yield
        return
    hook = embedding.register_forward_hook(lambda module, ids, rows: rows.float())
    try:
        yield
    finally:
        hook.remove()
