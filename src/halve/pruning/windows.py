"""The calibration windows of a run."""

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from halve.calibration import (
    ChatTemplate,
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
    runs_text = options.has_dense or options.held_out or options.trial_held_out
    if not needs and not runs_text:
        return CalibrationWindows()
    assert options.seq_len is not None
    size = (options.samples, options.seq_len)
    if options.calibration == "self" and not plan.adds_bos:  # needs no tokenizer
        return CalibrationWindows(
            sample_windows(plan.model, *size, options.seed, trust_remote_code)
        )
    encode = load_encoder(plan.model, trust_remote_code, plan.adds_bos)
    if options.calibration == "self":
        windows = sample_windows(
            plan.model, *size, options.seed, trust_remote_code, bos=encode.bos
        )
        return CalibrationWindows(windows, encode.bos)
    render = ChatTemplate(plan.model, trust_remote_code)
    corpus = load_corpus(options.calibration, "calibration", render)
    windows = draw_windows(corpus, encode, *size, options.seed)
    del corpus
    malloc_trim()  # the text and its tokens may be larger than what follows
    check_vocabulary(windows, plan.vocabulary)
    return CalibrationWindows(windows, encode.bos)
