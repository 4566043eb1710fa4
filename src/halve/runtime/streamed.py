"""A model run block by block, with one block's weights in memory at a time.

`StreamedModel` joins a skeleton with a checkpoint; `Stream` carries the hidden states
of a set of windows through it. Everything is computed in float32 whatever the dtype of
the checkpoint.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from halve.calibration import allocate_hidden
from halve.checkpoint import Checkpoint
from halve.distributed import ALONE, Ranks
from halve.errors import (
    HalveError,
    HalveWarning,
    NumericalError,
    UnsupportedModelError,
)
from halve.finite import is_finite
from halve.models import (
    Recording,
    Skeleton,
    Stored,
    build_skeleton,
    finish,
    match_names,
    record,
)
from halve.products import FastProducts

_DEVICES = ("cpu", "cuda")
# Enough tokens to keep the cores busy, few enough for the widest activations.
BATCH_TOKENS = 1024
# The one sample on which the inputs of a block's modules are watched.
_FIRST = slice(0, 1)
# Logits of one batch, in numbers: 256 MiB of float32.
_BATCH_LOGITS = 2**26

Result = TypeVar("Result")


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
class StreamedModel:
    """A checkpoint that is run one block at a time.

    Attributes:
        checkpoint: Where the tensors lie.
        skeleton: The model without them.
        tensors: Parameter or buffer -> tensor of the checkpoint.
        device: Where it runs.
        batch_tokens: How many tokens run through it at once, if one window has no more.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    tensors: dict[str, str]
    device: torch.device
    batch_tokens: int = BATCH_TOKENS

    @classmethod
    def open(
        cls, folder: Path, device: str = "auto", trust_remote_code: bool = False
    ) -> "StreamedModel":
        """Read config and headers; no tensor is read.

        Raises:
            UnsupportedModelError: No causal language model, or one of no known shape.
            CheckpointError: Damaged files, or tensors that contradict the config.
        """
        skeleton = build_skeleton(folder, trust_remote_code)
        checkpoint = Checkpoint.open(folder)
        infos = checkpoint.tensors.values()
        tensors = match_names(
            skeleton, [Stored(i.name, i.shape, i.dtype) for i in infos]
        )
        return cls(checkpoint, skeleton, tensors, choose_device(device))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.skeleton.blocks)

    def batch(self, length: int) -> int:
        """Return how many windows of a length run through it at once."""
        return max(self.batch_tokens // length, 1)

    def block_name(self, index: int) -> str:
        """Return a block's name, such as `model.layers.3`."""
        return f"{self.skeleton.path}.{index}"

    def own_dtypes(self, block: str) -> dict[str, torch.dtype]:
        """Return the parameters that are a block's alone, and how they are stored.

        What is tied to another name is left out, as are integers.
        """
        uses = Counter(self.tensors.values())
        found: dict[str, torch.dtype] = {}
        for path, _ in self.skeleton.model.get_submodule(block).named_parameters():
            info = self.checkpoint.tensors[self.tensors[f"{block}.{path}"]]
            if uses[info.name] == 1 and info.dtype.is_floating_point:
                found[path] = info.dtype
        return found

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Lend a block with its weights, on the device, in float32."""
        prefix = self.block_name(index) + "."
        with self._filled(n for n in self.tensors if n.startswith(prefix)):
            yield self.skeleton.blocks[index]

    @contextmanager
    def _surroundings(self, with_head: bool) -> Iterator[None]:
        """Fill everything outside the blocks, for a while; the head only if asked."""
        blocks = self.skeleton.path + "."
        head = {} if with_head else self._untied_head()
        with self._filled(
            n for n in self.tensors if not n.startswith(blocks) and n not in head
        ):
            yield

    def _untied_head(self) -> set[str]:
        """Return what the output head shares with nothing else."""
        head = self.skeleton.model.get_output_embeddings()
        paths = [n for n, m in self.skeleton.model.named_modules() if m is head]
        own = {n for n in self.tensors if paths and n.startswith(paths[0] + ".")}
        shared = {tensor for name, tensor in self.tensors.items() if name not in own}
        return {name for name in own if self.tensors[name] not in shared}

    @contextmanager
    def _filled(self, names: Iterable[str]) -> Iterator[None]:
        wanted = list(names)
        stored = self.checkpoint.read(dict.fromkeys(self.tensors[n] for n in wanted))
        values: dict[str, Tensor] = {}
        empty: dict[str, Tensor | None] = {}
        try:
            for name in wanted:
                source = self.tensors[name]
                if source in stored:
                    values[source] = self._usable(source, stored.pop(source))
                empty[name] = self._swap(name, values[source])
            values.clear()  # so that a weight is freed once another takes its place
            self._move_buffers()
            yield
        finally:
            for name, placeholder in empty.items():
                self._swap(name, placeholder)

    def _usable(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        usable = tensor.to(self.device, torch.float32)
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
        owner = self.skeleton.model.get_submodule(path)
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
        for module in self.skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "cpu":
                    module._buffers[name] = buffer.to(self.device)


@dataclass
class Stream:
    """The hidden states of windows on their way through a model.

    Where several processes share windows, each has a stream of its own ones.

    Attributes:
        model: What they go through.
        windows: Token numbers, [samples, length].
        apart: How many windows, the last ones, are kept apart from the others: no batch
            holds both kinds.
        ranks: Who has the other windows.
        numbers: Which of all windows these are.
        all_apart: How many windows all processes keep apart.
        hidden: States between two blocks, [samples, length, width], overwritten by
            each block.
        recordings: How blocks are called: for each size of batch where all batches are
            called alike, else for each batch (by its first sample).
    """

    model: StreamedModel
    windows: Tensor
    apart: int = 0
    ranks: Ranks = ALONE
    numbers: Sequence[int] = ()
    all_apart: int = 0
    hidden: Tensor = field(init=False)
    recordings: dict[tuple[int, int | None], Recording] = field(
        init=False, default_factory=dict
    )

    @classmethod
    @torch.no_grad()
    def start(
        cls,
        model: StreamedModel,
        windows: Tensor,
        budget: int,
        folder: Path | None = None,
        apart: int = 0,
        ranks: Ranks = ALONE,
    ) -> "Stream":
        """Run the model up to its first block.

        Args:
            model: The model.
            windows: [samples, length], int64: those of all processes.
            budget: Bytes of hidden states that may live in memory.
            folder: Where a mapped file lies past that.
            apart: How many of the windows, the last ones, are kept apart.
            ranks: Who shares them. Each process must be left one that is not apart, or
                one in all where all are.

        Raises:
            CalibrationError: Windows longer than the model can take.
        """
        model.skeleton.check_length(windows.shape[1])
        fitted, batch = len(windows) - apart, model.batch(windows.shape[1])
        held = [fitted + number for number in _own(apart, batch, ranks)]
        numbers = [*_own(fitted, batch, ranks), *held]
        windows = windows[numbers]
        stream = cls(model, windows, len(held), ranks, numbers, apart)
        steps = stream.steps() if ranks.size > 1 else ()  # of other sizes
        with model._surroundings(with_head=False), FastProducts():
            for part in (_FIRST, *stream.batches(), *steps):
                ids = windows[part].to(model.device)
                with _forward_of(model):
                    states, recording = record(model.skeleton, ids)
                if part is _FIRST:
                    samples, length = windows.shape
                    shape = (samples, length, states.shape[-1])
                    stream.hidden = allocate_hidden(shape, budget, folder)
                stream.hidden[part] = states.cpu()
                stream._note(part, recording)
        return stream

    def fork(self, budget: int, folder: Path | None = None) -> "Stream":
        """Return a second stream at the same place, to go its own way from there."""
        twin = replace(self)
        samples, length, width = self.hidden.shape
        twin.hidden = allocate_hidden((samples, length, width), budget, folder)
        twin.hidden.copy_(self.hidden)
        twin.recordings = self.recordings
        return twin

    def batches(self) -> Iterator[slice]:
        """Yield slices of samples, of equal size but for the last of each kind.

        However many processes share the windows, their batches are the same.
        """
        return self._slices(self.model.batch(self.windows.shape[1]))

    def steps(self) -> Iterator[slice]:
        """Yield smaller slices, where processes together take a batch at a time."""
        batch = self.model.batch(self.windows.shape[1])
        return self._slices(max(batch // self.ranks.size, 1))

    def _slices(self, size: int) -> Iterator[slice]:
        samples = len(self.windows)
        own = samples - self.apart
        for first, last in ((0, own), (own, samples)):
            for start in range(first, last, size):
                yield slice(start, min(start + size, last))

    def is_apart(self, part: slice) -> bool:
        """Whether a batch is of the windows kept apart."""
        return part.start >= len(self.windows) - self.apart

    def _note(self, part: slice, recording: Recording) -> None:
        """Keep a recording once where batches of its size are all called alike."""
        size = part.stop - part.start
        shared = self.recordings.setdefault((size, None), recording)
        if shared is not recording and not shared.same_as(recording):
            self.recordings[size, part.start] = recording

    def _recording(self, part: slice) -> Recording:
        size = part.stop - part.start
        own = self.recordings.get((size, part.start))
        return own or self.recordings[size, None]

    @torch.no_grad()
    def run_first(self, block: nn.Module, index: int) -> Tensor:
        """Return what a block makes of the first sample alone."""
        return self.run(block, index, _FIRST)

    def run(self, block: nn.Module, index: int, part: slice) -> Tensor:
        """Return what a block makes of one batch of hidden states, on the device.

        Differentiable where gradients are enabled.
        """
        call = self._recording(part).calls[index]
        with FastProducts(), _forward_of(self.model):
            return call.replay(block, self.hidden[part].to(self.model.device))

    @torch.no_grad()
    def advance(
        self,
        block: nn.Module,
        index: int,
        watch: Callable[[slice, Tensor], None] | None = None,
    ) -> None:
        """Replace the hidden states by what a block makes of them.

        Raises:
            NumericalError: They are no longer finite; names block and sample.
        """
        for part in self.batches():
            states = self.run(block, index, part)
            self._check_finite(states, index, part)
            if watch:
                watch(part, states)
            self.hidden[part] = states.cpu()

    def _check_finite(self, states: Tensor, index: int, part: slice) -> None:
        if is_finite(states):
            return
        bad = (~states.isfinite()).flatten(1).any(dim=1).nonzero()[0].item()
        raise NumericalError(
            f"Block {self.model.block_name(index)} gives NaN or infinity for sample "
            f"{self.numbers[part.start + int(bad)]}.",
            "Check the checkpoint and the text; a model that overflows in float32 "
            "cannot be pruned or judged.",
        )

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Run everything after the last block; yield logits, batch after batch.

        Yields:
            Samples, and their logits [batch, length, vocabulary] on the device.
        """
        size = self.model.skeleton.config.get_text_config().vocab_size
        with self.model._surroundings(with_head=True):
            for part in self._slices(_logits_batch(self, size)):
                yield part, self._logits(part)

    def _logits(self, part: slice) -> Tensor:
        ids = self.windows[part].to(self.model.device)
        hidden = self.hidden[part].to(self.model.device)
        recording = next(iter(self.recordings.values()))
        with FastProducts():
            return finish(self.model.skeleton, ids, hidden, recording)


@torch.no_grad()
def logits_apart(first: Stream, second: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Run what comes after the last block for the windows that two streams keep apart.

    Args:
        first: A stream behind the last block.
        second: Another of the same model, with as many windows apart.

    Yields:
        The logits of both, [batch, length, vocabulary] on the device.
    """
    model = first.model
    size = model.skeleton.config.get_text_config().vocab_size
    # Both at once, so half of the batch each.
    batch = max(_logits_batch(first, size) // 2, 1)
    parts = (
        [part for part in s._slices(batch) if s.is_apart(part)] for s in (first, second)
    )
    with model._surroundings(with_head=True):
        for one, other in zip(*parts, strict=True):
            yield first._logits(one), second._logits(other)


def _logits_batch(stream: Stream, vocabulary: int) -> int:
    """Return for how many windows logits are computed at once."""
    share = stream.model.batch_tokens / BATCH_TOKENS
    window = vocabulary * stream.windows.shape[1]
    return max(int(_BATCH_LOGITS * share) // window, 1)


def _own(count: int, batch: int, ranks: Ranks) -> list[int]:
    """Return which of so many windows a process has: whole batches, if there are any.

    Where there are fewer batches than processes, smaller pieces.
    """
    return ranks.own(count, max(min(batch, count // ranks.size), 1))


def with_smaller_batches(
    model: StreamedModel, length: int, work: Callable[[StreamedModel], Result]
) -> Result:
    """Do a piece of work; where memory is exhausted, again with half of the batch.

    Sums over batches are rounded otherwise then, and refining takes more steps, each on
    fewer tokens: the result is as good, but not the same to the bit.

    Args:
        model: As it is for the first attempt.
        length: Tokens in a window; a batch has one at least.
        work: Given a model; must be such that it can be begun anew.

    Raises:
        HalveError: The memory does not suffice for one window.

    Warns:
        HalveWarning: Of every halving.
    """
    while True:
        try:
            return work(model)
        except torch.OutOfMemoryError as error:
            if model.batch_tokens < 2 * length:
                raise HalveError(
                    f"The memory of {model.device} is exhausted by one window of "
                    f"{length} tokens.",
                    "Pass a shorter --seq-len, or --device cpu.",
                ) from error
        model = _halved(model)  # no sooner: the error holds the tensors of its frames


def _halved(model: StreamedModel) -> StreamedModel:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = model.batch_tokens // 2
    warnings.warn(
        f"The memory of {model.device} is exhausted; going on with {tokens} tokens at "
        "once, half as many as before.",
        HalveWarning,
        stacklevel=3,
    )
    return replace(model, batch_tokens=tokens)


@contextmanager
def _forward_of(model: StreamedModel) -> Iterator[None]:
    """Explain what breaks inside a model's own code: mostly a config that lies."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # it is no fault of the model's; `with_smaller_batches` knows what to do
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(". ")
        raise UnsupportedModelError(
            f"{type(model.skeleton.model).__name__} cannot be run as its config in "
            f"{model.checkpoint.folder} says ({type(error).__name__}: {reason}).",
            "Check config.json; if plain transformers runs it, open an issue.",
        ) from error
