"""Options of pruning: what follows from them, and which combinations are valid."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halve.errors import HalveError
from halve.option import check_choice, documented
from halve.options.prune_fields import PruneFields
from halve.options.rules import Rules, parse_rules
from halve.options.shared import check_device
from halve.sparsity_text import parse_expert_fraction, parse_part, parse_sparsity
from halve.text_name import parse_text_name

if TYPE_CHECKING:
    from halve.grids import QuantScheme
    from halve.patterns import Pattern

# Solvers that by default correct their targets and add a ridge, because they lose less
# then. The others follow their papers, which do neither.
_TUNED = ("auto", "admm")
# Solvers that compute no Gram matrix of the inputs.
_WITHOUT_GRAM = ("wanda", "magnitude")
# One calibration window in this many is held out where something is selected.
_HELD_OUT = 16
# Blocks of fewer bits have an int4 head by default, others an int8 one: so it loses
# less than they do (docs/log.md).
_FINE_HEAD = 3.5
# Tokens on which the importance of rows is measured.
_ROW_TOKENS = 4096
# Packed codes come in groups of a multiple of this, which the kernels need.
_GROUP_MULTIPLE = 32


@documented
@dataclass(frozen=True)
class PruneOptions(PruneFields):
    """Options of pruning that change the result."""

    @property
    def pairs(self) -> "list[tuple[Pattern, QuantScheme | None]]":
        """Pairs of pattern and grid to try; one unless target_bits is set."""
        from halve.grids import parse_scheme, schemes_for_bits  # noqa: PLC0415
        from halve.patterns import Unstructured, parse_pattern  # noqa: PLC0415

        if self.target_bits is not None:
            pairs = schemes_for_bits(self.target_bits, self.group_size, self.symmetric)
            return [(Unstructured(sparsity), grid) for sparsity, grid in pairs]
        if self.quantize is None:
            allow_dense = self.experts is not None
            return [(parse_pattern(self.sparsity, allow_dense), None)]
        pattern = parse_pattern(self.sparsity, allow_dense=True)
        grid = parse_scheme(self.quantize, self.group_size, self.symmetric)
        return [(pattern, grid if pattern.sparsity else grid.without_zero())]

    @property
    def _grid(self) -> "QuantScheme | None":
        """The grid that is tried first; None, without torch, where there is none."""
        if self.quantize is None and self.target_bits is None:
            return None
        return self.pairs[0][1]

    @property
    def expert_fraction(self) -> float | None:
        """Fraction of experts to keep, in (0, 1); None where all are kept."""
        return None if self.experts is None else parse_expert_fraction(self.experts)

    @property
    def leaves_weights(self) -> bool:
        """Whether no weight of the experts that are kept is pruned or quantized."""
        if self.experts is None or self.quantize or self.target_bits is not None:
            return False
        return parse_sparsity(self.sparsity, allow_dense=True) == 0

    @property
    def only_drops_experts(self) -> bool:
        """Whether the weights of the experts that are kept, and all others, stay."""
        return self.leaves_weights and not self.refine and not self.rules

    @property
    def parsed_rules(self) -> Rules:
        """Rules and skipped matrices, parsed."""
        return parse_rules(self.rules, self.skip, self.quantize is not None)

    def for_matrix(self, tensor: str) -> "PruneOptions":
        """Return the options of one matrix: with the sparsity that a rule asks for."""
        sparsity = self.parsed_rules.sparsity(tensor)
        return self if sparsity is None else replace(self, sparsity=sparsity)

    @property
    def head_grid(self) -> str | None:
        """Name of the grid of embedding and head; None where they are left alone."""
        if self.quantize_head != "auto":
            return None if self.quantize_head == "none" else self.quantize_head
        grid = self._grid
        if grid is None or not self.packed:
            return None
        bits = grid.bits if self.target_bits is None else self.target_bits
        return "int8" if bits > _FINE_HEAD else "int4"

    @property
    def corrects(self) -> bool:
        """Whether matrices are pruned in order, with error-corrected targets."""
        if self.leaves_weights:
            return False
        if self.sequential is None:
            return self.solver in _TUNED
        return self.sequential

    @property
    def diagonal_ridge(self) -> float:
        """Factor of the ridges on the diagonal of Gram matrices (`Hessian.ridges`)."""
        if self.ridge is None:
            return 1.0 if self.solver in _TUNED else 0.0
        return self.ridge

    @property
    def sampled(self) -> int:
        """Number of calibration windows that the model samples itself."""
        if self.calibration == "self":
            return self.samples
        return parse_part(self.self_samples, self.samples)

    @property
    def row_samples(self) -> int:
        """Number of windows on which the importance of rows is measured."""
        if not self._weighs_rows and self.allocation != "importance":
            return 0
        if self.importance_samples is None:
            return max(_ROW_TOKENS // (self.seq_len or _ROW_TOKENS), 1)
        return self.importance_samples

    @property
    def _weighs_rows(self) -> bool:
        """Whether a matrix may get a mask for which its rows compete."""
        texts = [self.sparsity, *(text for _, text in self.parsed_rules.sparsities)]
        parsed = [parse_sparsity(text, allow_dense=True) for text in texts]
        competing = any(not isinstance(each, tuple) and each > 0 for each in parsed)
        return self.solver in _TUNED and (competing or self.target_bits is not None)

    @property
    def allocates_by_importance(self) -> bool:
        """Whether each matrix gets the sparsity that its weights' saliency asks for."""
        if self.allocation != "auto":
            return self.allocation == "importance"
        return self.row_samples > 0 and self._is_distributed

    @property
    def _is_distributed(self) -> bool:
        """Whether there is an unstructured sparsity to distribute."""
        if self.target_bits is not None:
            return False
        parsed = parse_sparsity(self.sparsity, allow_dense=True)
        return not isinstance(parsed, tuple) and parsed > 0

    @property
    def has_dense(self) -> bool:
        """Whether the hidden states of the dense model are computed as well."""
        return self.corrects or self.refine

    @property
    def uses_text(self) -> bool:
        """Whether calibration windows run through the model, whatever solvers read."""
        tries = self.held_out > 0 or self.trial_held_out > 0
        return self.has_dense or tries or self.row_samples > 0

    @property
    def activation_parts(self) -> int:
        """Number of equal parts into which the memory for activations is divided.

        With a dense model: one for each model's hidden states, and one for the dense
        inputs of a block's matrices.
        """
        return 3 if self.has_dense else 1

    @property
    def held_out(self) -> int:
        """Number of windows held out to select candidates, experts, refined states."""
        selects = self.solver == "auto" or self.refine or self.experts is not None
        if not selects and self.target_bits is not None:
            selects = len(self.pairs) > 1
        return max(self.samples // _HELD_OUT, 1) if selects else 0

    @property
    def trial_held_out(self) -> int:
        """Number of windows held out to judge trials of the whole model."""
        tries = self.allocation == "error" or self.target_bits is not None
        return max(self.samples // _HELD_OUT, 1) if tries else 0

    def check(self) -> None:
        """Raise HalveError on the first option, or combination, that is invalid.

        What needs no grid is checked first, so that most mistakes are reported before
        torch is imported.
        """
        check_device(self.device)
        self._check_choices()
        parse_text_name(self.calibration)
        _ = self.expert_fraction
        allow_dense = self.quantize is not None or self.experts is not None
        parse_sparsity(self.sparsity, allow_dense)
        for name in ("samples", "block_size", "group_size", "seq_len", "epochs"):
            self._check_positive(name)
        self._check_damping()
        self._check_ridge()
        self._check_gram_options()
        self._check_target_bits()
        self._check_allocation()
        self._check_rules()
        self._check_importance()
        self._check_self_samples()
        self._check_held_out()
        _ = self._grid  # there may be none of that many bits
        self._check_grid_options()
        self._check_packed_groups()

    def _check_self_samples(self) -> None:
        number = parse_part(self.self_samples, self.samples)
        if number and self.calibration == "self":
            raise HalveError(
                "All windows are sampled from the model where calibration is self.",
                "Set self_samples to 0 (--self-samples 0), or name a text "
                "(--calibration).",
            )
        if not 0 <= number < self.samples:
            raise HalveError(
                f"self_samples is {self.self_samples}, and samples {self.samples}, of "
                "which some must be of the text.",
                "Lower self_samples (--self-samples), or set calibration to self "
                "(--calibration).",
            )

    def _check_choices(self) -> None:
        names = ("solver", "allocation", "quantize_head", "matmul_precision", "bos")
        for name in names:
            check_choice(self, name)
        if self.quantize is not None:
            check_choice(self, "quantize")

    def _check_target_bits(self) -> None:
        if self.target_bits is None:
            return
        if self.quantize or self.sparsity != PruneOptions.sparsity:
            raise HalveError(
                "target_bits selects the sparsity and the grid, but one of them was "
                "given as well.",
                "Set target_bits alone (--target-bits), or sparsity and quantize "
                "(--sparsity, --quantize).",
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < 1:
            raise HalveError(
                f"{name} is {value}, which is not positive.",
                f"Set {name} to 1 or more (--{name.replace('_', '-')}).",
            )

    def _check_grid_options(self) -> None:
        chosen = (self.group_size, self.symmetric)
        default = (PruneOptions.group_size, PruneOptions.symmetric)
        unused = self._grid is None and self.head_grid is None
        if unused and chosen != default:
            raise HalveError(
                "group_size or symmetric was given, but nothing is quantized.",
                "Set quantize or target_bits as well (--quantize int4, "
                "--target-bits 3).",
            )

    def _check_packed_groups(self) -> None:
        quantized = self._grid is not None or self.head_grid is not None
        if self.packed and quantized and self.group_size % _GROUP_MULTIPLE:
            raise HalveError(
                f"Groups of {self.group_size} weights cannot be packed.",
                f"Set group_size to a multiple of {_GROUP_MULTIPLE} (--group-size), or "
                "packed to False (omit --pack).",
            )

    def _check_allocation(self) -> None:
        """Check that there is something to distribute, and something to do it by."""
        if self.allocation == "importance" and self.importance_samples == 0:
            raise HalveError(
                "importance_samples is 0, and allocation importance.",
                "Omit importance_samples (--importance-samples), or set allocation to "
                "uniform (--allocation uniform).",
            )
        if self.allocation in {"auto", "uniform"} or self._is_distributed:
            return
        by_bits = self.target_bits is not None
        target = "target_bits" if by_bits else f"The pattern {self.sparsity}"
        raise HalveError(
            f"{target} prunes all blocks alike, so allocation {self.allocation!r} has "
            "nothing to distribute.",
            "Set allocation to uniform (--allocation uniform), or sparsity to a "
            "fraction such as 50%.",
        )

    def _check_rules(self) -> None:
        rules = self.parsed_rules  # checked whatever else is set
        tries = self.allocation == "error"
        if (not tries and self.target_bits is None) or not rules:
            return
        other = "allocation" if tries else "target_bits"
        raise HalveError(
            f"{other} chooses the sparsity of matrices, and so do rules or skip.",
            f"Omit {other} (--{other.replace('_', '-')}), or the rules (--rule, "
            "--skip).",
        )

    def _check_held_out(self) -> None:
        if max(self.held_out, self.trial_held_out) >= self.samples:
            raise HalveError(
                f"samples is {self.samples}, of which one is held out, so none is left "
                "for calibration.",
                "Set samples to 2 or more (--samples).",
            )

    def _check_damping(self) -> None:
        if not 0 <= self.damping <= 1:
            raise HalveError(
                f"damping is {self.damping}, which is not a fraction of the mean "
                "diagonal.",
                "Set damping to a value between 0 and 1, such as 0.01 (--damping).",
            )

    def _check_importance(self) -> None:
        if self.importance_samples and not self.row_samples:
            raise HalveError(
                f"importance_samples is {self.importance_samples}, but rows are only "
                "weighed by auto and admm, for unstructured sparsities.",
                "Omit importance_samples (--importance-samples), or set solver to auto "
                "(--solver) and sparsity to a fraction such as 50%.",
            )

    def _check_ridge(self) -> None:
        if not 0 <= self.diagonal_ridge < float("inf"):
            raise HalveError(
                f"ridge is {self.ridge}, which is not a number of 0 or more.",
                "Set ridge to 0 for none, or to a number such as 1 (--ridge).",
            )

    def _check_gram_options(self) -> None:
        """Check that something depends on what is added to Gram matrices."""
        defaults = {"damping": PruneOptions.damping, "ridge": PruneOptions.ridge}
        given = [
            name for name, value in defaults.items() if getattr(self, name) != value
        ]
        rounds = self.quantize is not None or self.target_bits is not None
        has_trials = self.allocation == "error"
        if self.solver not in _WITHOUT_GRAM or rounds or has_trials or self.corrects:
            return
        if given:
            raise HalveError(
                f"{given[0]} was given, but the solver {self.solver} computes no Gram "
                "matrix of the inputs to add it to.",
                f"Omit {given[0]} (--{given[0]}), or set solver to auto, admm or "
                "sparsegpt (--solver).",
            )
