"""The plan of a run, computed from the config and file headers before it starts.

A plan is a frozen value that can be printed, compared and tested. No tensor is read.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halve.checkpoint import (
    Checkpoint,
    TensorInfo,
    find_side_files,
    has_no_weights,
)
from halve.devices import choose_device
from halve.errors import HalveError, PatternError
from halve.formats import would_shrink
from halve.layout import (
    Layout,
    PlannedBlock,
    make_layout,
)
from halve.models import (
    MetaModel,
    build_meta_model,
    cache_width,
    expected_tensors,
)
from halve.numerics.precision import FULL_PRECISION
from halve.options import PruneOptions
from halve.patterns import Pattern, parse_pattern
from halve.pruning.rules import matrix_names
from halve.runtime.fewer_experts import select_experts
from halve.sparsity_text import parse_part


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        model: Folder of the checkpoint.
        options: The options, with `seq_len` resolved to a number.
        layout: The matrices of every block, and the shard of every tensor.
        width: Size of the hidden states.
        vocabulary: Size of the model's vocabulary.
        cache_width: See `halve.models.cache_width`.
        scored_heads: See `MetaModel.scored_heads`.
        adds_bos: Whether windows begin with the tokenizer's BOS token, if it puts that
            in front of a text by itself.
        model_type: As in the model's config.json.
        experts_per_token: See `MetaModel.experts_per_token`.
        dropping: How experts are dropped; None where all are kept.
    """

    model: Path
    options: PruneOptions
    layout: Layout
    width: int
    vocabulary: int
    cache_width: int
    scored_heads: int
    adds_bos: bool
    model_type: str
    experts_per_token: int | None = None
    dropping: "DroppedExperts | None" = None

    @property
    def input_layout(self) -> Layout:
        """The layout of the model as it is read, with all experts."""
        return self.layout if self.dropping is None else self.dropping.layout

    @property
    def before_dropping(self) -> "Plan":
        """The plan of the model with all experts."""
        return replace(self, layout=self.input_layout, dropping=None)

    @property
    def tokens(self) -> int:
        """Number of tokens in all calibration windows."""
        return self.options.samples * (self.options.seq_len or 0)

    @property
    def activation_parts(self) -> int:
        """Number of equal parts into which the memory for activations is divided.

        Beside those of the options, one for the kept inputs of a block's experts.
        """
        return self.options.activation_parts + self.layout.has_experts

    def identity(self) -> dict[str, Any]:
        """Return all that the bytes of the output depend on, except the machine."""
        pattern = str(parse_pattern(self.options.sparsity, allow_dense=True))
        options = asdict(self.options) | {
            "sparsity": pattern,
            "self_samples": parse_part(self.options.self_samples, self.options.samples),
            "rules": list(self.options.rules),
            "skip": list(self.options.skip),
        }
        if self.options.experts is None:
            del options["experts"]  # identities do not change with an option unused
        return options | {"sources": self.layout.sources}


@dataclass(frozen=True)
class DroppedExperts:
    """How a run drops experts.

    Attributes:
        total: Number of experts of each module of experts.
        kept: Number that each keeps.
        layout: The layout of the model with all experts.
        changes: Entries of config.json -> new values.
    """

    total: int
    kept: int
    layout: Layout
    changes: dict[str, int]


def make_plan(
    model: Path,
    options: PruneOptions,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        model: Folder of the checkpoint.
        options: The options of the run.
        trust_remote_code: Allow Python code that comes with the model to run.
        needs_weights: False to plan from the config alone if the folder has no
            weights.

    Raises:
        HalveError: Any error that can be detected before a tensor is read: an invalid
            option, an unsupported model, a damaged header, a pattern that does not
            divide the width of a matrix.
    """
    options.check()
    _check_precision(options)
    meta_model = build_meta_model(model, trust_remote_code)
    find_side_files(model)  # refused, if one cannot be copied, before work starts
    by_config = not needs_weights and has_no_weights(model)
    checkpoint = _expected(model, meta_model) if by_config else Checkpoint.open(model)
    layout, dropping = make_layout(checkpoint, meta_model), None
    if options.expert_fraction is not None:
        selection = select_experts(
            checkpoint, meta_model, options.expert_fraction, trust_remote_code
        )
        fewer = selection.fewer
        dropping = DroppedExperts(fewer.total, fewer.kept, layout, fewer.changes)
        layout = make_layout(selection.keep({}), fewer.meta_model)
    options.parsed_rules.check_matches(matrix_names(layout))
    _check_allocation(layout, options)
    _check_pattern(layout.blocks, options)
    if options.packed:
        _check_packing(layout, options)
    _check_head(layout, options)
    return Plan(
        model=model,
        options=_with_length(options, meta_model),
        layout=layout,
        width=meta_model.width,
        vocabulary=meta_model.vocabulary,
        cache_width=cache_width(meta_model.config),
        scored_heads=meta_model.scored_heads,
        adds_bos=options.bos == "auto" and not meta_model.is_of_the_papers,
        model_type=meta_model.config.model_type,
        experts_per_token=meta_model.experts_per_token,
        dropping=dropping,
    )


def _expected(model: Path, meta_model: MetaModel) -> Checkpoint:
    """Return the checkpoint that a config describes, without any file."""
    stored = expected_tensors(meta_model, meta_model.dtype)
    infos = [
        TensorInfo(s.name, "", s.shape, s.dtype or meta_model.dtype) for s in stored
    ]
    return Checkpoint(model, {info.name: info for info in infos})


def _with_length(options: PruneOptions, meta_model: MetaModel) -> PruneOptions:
    length = options.seq_len or meta_model.default_length
    meta_model.check_length(length)
    return replace(options, seq_len=length)


def _check_precision(options: PruneOptions) -> None:
    """Raise HalveError if a precision for CUDA is asked for on another device."""
    if options.matmul_precision == FULL_PRECISION:
        return
    if choose_device(options.device).type != "cuda":
        raise HalveError(
            f"matmul_precision is {options.matmul_precision!r}, which changes products "
            "on CUDA only, but the run is on the CPU.",
            f"Leave matmul_precision at {FULL_PRECISION} (--matmul-precision), or set "
            "device to cuda (--device).",
        )


def _check_pattern(blocks: tuple[PlannedBlock, ...], options: PruneOptions) -> None:
    """Raise PatternError if a pattern does not fit a matrix, or has no sensible effect.

    A fraction of a matrix's weights, rounded to their number, may be none or all.
    """
    matrices = [matrix for block in blocks for matrix in block.matrices]
    counts: dict[Pattern, int] = {}
    for planned in matrices:
        for pattern, _ in options.for_matrix(planned.name).pairs:
            pattern.check_fits(planned.name, planned.matrix.shape[1])
            count = pattern.count(planned.elements)
            if count == planned.elements:
                raise PatternError(
                    f"A sparsity of {pattern} prunes all of the {planned.elements} "
                    f"weights of {planned.name}.",
                    "Choose a lower sparsity.",
                )
            counts[pattern] = max(count, counts.get(pattern, 0))
    for pattern, most in counts.items():
        if pattern.sparsity and not most:
            raise PatternError(
                f"A sparsity of {pattern} prunes nothing: the matrices have too few "
                "weights.",
                "Choose a higher sparsity, such as 50%.",
            )


def _check_allocation(layout: Layout, options: PruneOptions) -> None:
    """Raise HalveError if importance is asked for where it is not measured."""
    if options.allocation == "importance" and layout.has_experts:
        raise HalveError(
            "The importance of weights is not measured in a mixture of experts, each "
            "of which sees other tokens.",
            "Set allocation to uniform or error (--allocation).",
        )


def _check_head(layout: Layout, options: PruneOptions) -> None:
    """Raise HalveError if a head is to be quantized and there is none that can be."""
    if options.quantize_head in {"auto", "none"} or layout.heads:
        return
    raise HalveError(
        "The embedding and the output head are of classes of the model's, which cannot "
        "be quantized.",
        "Set quantize_head to none (--quantize-head none).",
    )


def _check_packing(layout: Layout, options: PruneOptions) -> None:
    """Raise HalveError if packing would shrink no matrix."""
    for block in layout.blocks:
        for planned in block.matrices:
            pairs = options.for_matrix(planned.name).pairs
            pattern, scheme = max(pairs, key=lambda pair: pair[0].sparsity)
            rows, columns = planned.matrix.shape
            dtype = layout.tensors[planned.tensor].dtype
            nonzeros = rows * columns - pattern.count(rows * columns)
            if would_shrink((rows, columns), nonzeros, dtype, scheme):
                return
    sparsest = max((pattern for pattern, _ in options.pairs), key=lambda p: p.sparsity)
    raise HalveError(
        f"With {sparsest} zeros no matrix of any block would get smaller when packed, "
        "because the mask takes a bit per weight.",
        "Set packed to False (omit --pack), or prune more.",
    )
