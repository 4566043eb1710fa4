"""The calibration windows of a run."""

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


def calibration_windows(plan: Plan, trust_remote_code: bool) -> Tensor | None:
    """Return calibration windows, [samples, length]; None where none are needed."""
    options = plan.options
    needs = combined_needs(candidates(options, plan.layout.dtype))
    runs_text = options.has_dense or options.held_out or options.allocation_held_out
    if not needs and not runs_text:
        return None
    assert options.seq_len is not None
    size = (options.samples, options.seq_len)
    if options.calibration == "self":
        return sample_windows(plan.model, *size, options.seed, trust_remote_code)
    render = ChatTemplate(plan.model, trust_remote_code)
    corpus = load_corpus(options.calibration, "calibration", render)
    encode = load_encoder(plan.model, trust_remote_code)
    windows = draw_windows(corpus, encode, *size, options.seed)
    check_vocabulary(windows, plan.vocabulary)
    return windows
