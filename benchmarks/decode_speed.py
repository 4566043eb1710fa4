"""Times Halve's decoding in a process that holds the model and waits for its turn.

The model is loaded only once, however often it is timed, so that rivals which are other
programs can take turns with it in interleaved rounds.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import halve
from halve.runtime.decode import new_cache, prepare


class Decoder:
    """A process that holds a model and times it on request."""

    def __init__(self, folder: Path, activations: str | None = None) -> None:
        """Start the process and wait until the model is loaded.

        Args:
            folder: Folder of a model, dense or packed.
            activations: As in `halve.load`.
        """
        # Not forked: OpenMP's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(folder, activations, other)
        )
        self._process.start()
        other.close()
        self._pipe.recv()

    def decode(self, tokens: int, threads: int) -> float:
        """Return tokens per second of decoding one sequence, after a warm-up.

        Args:
            tokens: How many to decode.
            threads: Number of torch's threads, which Halve's kernels use as well.
        """
        self._pipe.send((tokens, threads))
        return tokens / self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(folder: Path, activations: str | None, pipe: Connection) -> None:
    """Load a model, then send the seconds of each request until there are no more."""
    disable_progress_bar()
    model = halve.load(folder, "cpu", activations=activations or "int16")
    prepare(model)
    pipe.send(None)
    while True:
        try:
            tokens, threads = pipe.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)
        _seconds(model, 2)
        pipe.send(_seconds(model, tokens))


@torch.inference_mode()
def _seconds(model: Any, tokens: int) -> float:
    """Decode greedily after a prompt of one token, as llama-bench does."""
    state = model(torch.tensor([[1]]), use_cache=True, past_key_values=new_cache(model))
    started = time.perf_counter()
    for _ in range(tokens):
        ids = state.logits[:, -1:].argmax(-1)
        state = model(ids, past_key_values=state.past_key_values, use_cache=True)
    return time.perf_counter() - started
