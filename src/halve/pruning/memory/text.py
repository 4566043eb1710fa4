"""Memory that getting the calibration windows takes, before the blocks."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from halve.calibration import corpus_nbytes, load_encoder
from halve.errors import SourceError
from halve.pruning.memory.phases import Phase
from halve.pruning.plan import Plan
from halve.runtime.generation import windows_at_once

# Bytes in memory for a byte of text: all characters of a part take two each where one
# of them, such as a typographic quotation mark, needs two.
_TEXT = 2
# Bytes of token ids for a byte of text: four for a token, which is seldom less than
# three bytes long, and room to grow in an array.
_TOKENS = 1.5
# What a text that cannot be cut takes for each of its bytes while it is tokenized.
_WHOLE = 165


# The phase in which the whole model is in memory.
SAMPLING = "sampling windows"


def text_phases(plan: Plan) -> Iterator[Phase]:
    """Yield the phases in which windows are sampled, and the text is read."""
    options = plan.options
    if options.sampled:
        yield _sampling(plan)
    if options.sampled < options.samples:
        yield _reading(plan)


def _sampling(plan: Plan) -> Phase:
    """Return the phase in which the model, with all its experts, samples windows."""
    options, layout = plan.options, plan.input_layout
    assert options.seq_len is not None
    window = options.seq_len * plan.cache_width * layout.dtype.itemsize
    together = min(options.sampled, windows_at_once(window))
    parts = {
        "the whole model": layout.output_bytes,
        "keys and values": together * window,
    }
    return Phase(SAMPLING, parts, has_activations=False)


def _reading(plan: Plan) -> Phase:
    """Return the phase in which the calibration text is read.

    Only the text's size is read, and the tokenizer, which tells whether the text can be
    tokenized in pieces.
    """
    nbytes = corpus_nbytes(plan.options.calibration, "calibration")
    in_pieces = _is_cut(plan.model)
    part = "tokens" if in_pieces else "the whole text, tokenized at once"
    tokens = int(nbytes * (_TOKENS if in_pieces else _WHOLE))
    parts = {"text": _TEXT * nbytes, part: tokens}
    return Phase("reading text", parts, has_activations=False)


@lru_cache(maxsize=8)
def _is_cut(folder: Path) -> bool:
    """Return whether a model's tokenizer is one that texts can be cut for."""
    try:
        return load_encoder(folder).cutter is not None
    except SourceError:  # which the run will report
        return True
