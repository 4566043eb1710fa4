"""The calibration windows of a run."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halve.calibration import (
    ChatTemplate,
    Encode,
    check_vocabulary,
    draw_windows,
    load_corpus,
    load_encoder,
)
from halve.pruning.plan import Plan
from halve.pruning.select.candidates import candidates
from halve.pruning.select.selection import combined_needs
from halve.runtime.generation import sample_windows
from halve.runtime.malloc_trim import malloc_trim


@dataclass(frozen=True)
class CalibrationWindows:
    """The windows of a run.

    Attributes:
        ids: Token ids, [samples, length], int64; None where no windows are needed.
        bos: The BOS token with which every window begins; None for none.
    """

    ids: Tensor | None = None
    bos: int | None = None

    def identity(self) -> dict[str, Any]:
        """Return what two runs on the same windows have in common."""
        digest = (
            None if self.ids is None else hashlib.sha256(self.ids.numpy().tobytes())
        )
        return {"calibration_sha256": digest and digest.hexdigest(), "bos_id": self.bos}


def calibration_windows(plan: Plan, trust_remote_code: bool) -> CalibrationWindows:
    """Return the calibration windows of a run."""
    options = plan.options
    needs = combined_needs(candidates(options, plan.layout.dtype))
    if not needs and not options.uses_text:
        return CalibrationWindows()
    of_text = options.samples - options.sampled
    if not of_text and not plan.adds_bos:  # needs no tokenizer
        return CalibrationWindows(_sample(plan, None, trust_remote_code))
    encode = load_encoder(plan.model, trust_remote_code, plan.adds_bos)
    parts: list[Tensor] = []
    if of_text:
        parts.append(_draw(plan, of_text, encode, trust_remote_code))
    if options.sampled:
        parts.append(_sample(plan, encode.bos, trust_remote_code))
    windows = parts[0] if len(parts) == 1 else _shuffled(parts, options.seed)
    return CalibrationWindows(windows, encode.bos)


def _draw(plan: Plan, samples: int, encode: Encode, trust_remote_code: bool) -> Tensor:
    """Return windows of the calibration text, [samples, length]."""
    options = plan.options
    assert options.seq_len is not None
    render = ChatTemplate(plan.model, trust_remote_code)
    corpus = load_corpus(options.calibration, "calibration", render)
    windows = draw_windows(corpus, encode, samples, options.seq_len, options.seed)
    del corpus
    malloc_trim()  # the text and its tokens may be larger than what follows
    check_vocabulary(windows, plan.vocabulary)
    return windows


def _sample(plan: Plan, bos: int | None, trust_remote_code: bool) -> Tensor:
    """Return the windows that the model samples itself, [samples, length]."""
    options = plan.options
    assert options.seq_len is not None
    size = (options.sampled, options.seq_len, options.seed)
    windows = sample_windows(plan.model, *size, trust_remote_code, bos=bos)
    malloc_trim()
    return windows


def _shuffled(parts: list[Tensor], seed: int) -> Tensor:
    """Return all windows in random order: the last of them are held out."""
    windows = torch.cat(parts)
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(len(windows), generator=generator)]
