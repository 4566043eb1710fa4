"""The options of pruning, each with its help, default and heading.

What follows from them, and which of them go together, is in `options.prune`.
"""

from dataclasses import dataclass
from typing import Annotated

from halve.option import (
    CALIBRATION,
    FEW_BITS,
    OUTPUT,
    RESOURCES,
    SOLVER,
    TARGET,
    Option,
    Options,
)
from halve.options.choices import (
    ALLOCATION_CHOICES,
    BOS_CHOICES,
    HEAD_CHOICES,
    PRECISION_CHOICES,
    QUANTIZE_CHOICES,
    SOLVER_CHOICES,
)
from halve.options.run import RunKeywords
from halve.options.shared import BOS_DETAILS, LENGTH, Device


@dataclass(frozen=True)
class PruneFields(Options):
    """The fields of `PruneOptions`, which is the class to make instances of."""

    sparsity: Annotated[
        str | float,
        Option(
            "Fraction of weights to prune (50% or 0.5), or n:m, such as 2:4.",
            TARGET,
            details="With n:m, at most n of every m consecutive inputs of a row stay "
            "nonzero. 0 is accepted together with quantize or experts.",
        ),
    ] = "50%"
    solver: Annotated[
        str,
        Option(
            "Algorithm that prunes one matrix.",
            SOLVER,
            choices=SOLVER_CHOICES,
            details="auto computes admm and wanda with refit for each matrix and takes "
            "the one with the lower error on held-out windows, a sixteenth of all.",
        ),
    ] = "auto"
    calibration: Annotated[
        str,
        Option(
            "Calibration text: c4, wikitext2, ptb, a data set, a .txt, .jsonl or "
            ".parquet file, stdlib (this Python's sources), or self (text sampled from "
            "the model).",
            CALIBRATION,
            details="A data set is NAME:CONFIG:SPLIT:COLUMN, a name on the Hub or a "
            "folder; parts may be empty or left out (the split is then train), and "
            "FILE:COLUMN names a column of a file. By default the column is text, "
            "messages or conversations, the first that there is; conversations are "
            "rendered by the model's chat template. With self, the model must fit into "
            "memory.",
        ),
    ] = "c4"
    samples: Annotated[
        int,
        Option(
            "Number of calibration windows.",
            CALIBRATION,
        ),
    ] = 128
    self_samples: Annotated[
        str | float,
        Option(
            "How many of the calibration windows (32 or 25%) the model samples itself; "
            "the others are of the text.",
            CALIBRATION,
            details="On text of other kinds than the calibration text, far less is "
            "lost; on text of its kind about as much with a quarter, and more with a "
            "half. The model must fit into memory.",
        ),
    ] = "0"
    seq_len: Annotated[
        int | None,
        Option("Length of a window.", CALIBRATION, unit="tokens", unset=LENGTH),
    ] = None
    seed: Annotated[
        int, Option("Seed for drawing the calibration windows.", CALIBRATION)
    ] = 0
    bos: Annotated[
        str,
        Option(
            "Whether every calibration window begins with the tokenizer's BOS token.",
            CALIBRATION,
            choices=BOS_CHOICES,
            details=BOS_DETAILS,
        ),
    ] = "auto"
    damping: Annotated[
        float,
        Option(
            "Fraction of the mean diagonal to add to Gram matrices.",
            SOLVER,
            details="From 0 to 1.",
        ),
    ] = 0.01
    ridge: Annotated[
        float | None,
        Option(
            "Caution against other texts: factor of what is added to the diagonal of "
            "Gram matrices where inputs explain each other badly.",
            SOLVER,
            unset="1 for auto and admm, 0 for the others",
            details="Solutions rely less on correlations that may be of the "
            "calibration text alone.",
        ),
    ] = None
    importance_samples: Annotated[
        int | None,
        Option(
            "Number of windows on which it is measured how much each row of a matrix "
            "matters to the model's predictions; 0 to let all count alike.",
            SOLVER,
            unset="as many as have 4096 tokens for auto and admm, 0 for the others",
            minimum=0,
            details="Unstructured masks of admm keep more of the rows that matter. "
            "Reads the model twice more. Models with experts are not measured.",
        ),
    ] = None
    block_size: Annotated[
        int,
        Option(
            "Columns that sparsegpt processes at a time.",
            SOLVER,
        ),
    ] = 128
    device: Device = "auto"
    packed: Annotated[
        bool,
        Option(
            "Store the pruned matrices packed, as `halve pack` does.",
            OUTPUT,
            flags=("--pack",),
        ),
    ] = False
    refit: Annotated[
        bool,
        Option(
            "Tune the remaining weights once the mask is chosen.",
            SOLVER,
            details="Runs conjugate gradients on the layer error, which never rises. "
            "admm always does this.",
        ),
    ] = False
    sequential: Annotated[
        bool | None,
        Option(
            "Prune the matrices of a block in order, each correcting for the pruning "
            "of those before it.",
            SOLVER,
            unset="on for auto and admm, off for the others",
            flags=("--sequential/--no-sequential",),
            details="The target of each matrix is corrected so that its outputs on the "
            "pruned model's inputs approximate the dense model's outputs.",
        ),
    ] = None
    refine: Annotated[
        bool,
        Option(
            "Tune each pruned block to reproduce the dense block's outputs.",
            SOLVER,
            details="Adam updates the remaining weights, biases and norms; no labels "
            "are used. A sixteenth of the windows is held out and the best state on "
            "those is stored, so the held-out error never rises.",
        ),
    ] = False
    epochs: Annotated[
        int,
        Option(
            "Passes over the windows for --refine.",
            SOLVER,
        ),
    ] = 3
    quantize: Annotated[
        str | None,
        Option(
            "Quantize the remaining weights to a grid of this many bits.",
            FEW_BITS,
            choices=QUANTIZE_CHOICES,
            unset="no quantization",
            details="The error of each rounding is compensated by the weights that are "
            "quantized later. The output stores dequantized values in the model's "
            "dtype, and halve.json the grid of each matrix.",
        ),
    ] = None
    group_size: Annotated[
        int,
        Option(
            "Consecutive weights of a row that have one scale.",
            FEW_BITS,
        ),
    ] = 128
    symmetric: Annotated[
        bool,
        Option(
            "Quantize symmetrically, or asymmetrically with zero points.",
            FEW_BITS,
            flags=("--symmetric/--asymmetric",),
        ),
    ] = True
    quantize_head: Annotated[
        str,
        Option(
            "Grid of the embedding and the output head.",
            FEW_BITS,
            choices=HEAD_CHOICES,
            details="They are rounded to nearest. auto leaves them unless the output "
            "is quantized and packed, and then takes int4 below 3.5 bits a weight, "
            "else int8. An embedding of a class of the model's stays as it is.",
        ),
    ] = "auto"
    target_bits: Annotated[
        float | None,
        Option(
            "Bits per weight, including mask and scales; selects sparsity and grid.",
            FEW_BITS,
            unset="the given sparsity and grid",
            details="Tried on the whole model: each pair of sparsity and grid of that "
            "size for all matrices, and two grids without zeros, one for some matrices "
            "and one for the rest. What diverges least on held-out windows is taken. "
            "That takes several times as long. Cannot be combined with sparsity or "
            "quantize.",
        ),
    ] = None
    allocation: Annotated[
        str,
        Option(
            "How an unstructured sparsity is distributed: equally, by the importance "
            "of weights to the predictions, or less for blocks with a larger error.",
            TARGET,
            choices=ALLOCATION_CHOICES,
            details="importance compares the weights of all matrices by what pruning "
            "each of them would change in the predictions, and gives each matrix a "
            "sparsity between S / 2 and (1 + S) / 2, S being that of the whole model. "
            "error tries several allocations to blocks on the whole model and takes "
            "the one that diverges least on held-out windows, uniform included. With "
            "both the whole model has floor(weights * sparsity) zeros, exactly. auto "
            "is importance where rows are weighed (importance_samples), and else "
            "uniform.",
        ),
    ] = "auto"
    experts: Annotated[
        str | float | None,
        Option(
            "Fraction of each block's experts to keep (75% or 0.75); the others are "
            "dropped whole.",
            TARGET,
            unset="all",
            details="Of a mixture of experts. They are scored by what they add to the "
            "outputs of their block (REAP), and without the router's weight (mean "
            "norm); each block takes the score with the lower error on held-out "
            "windows. The rest is pruned afterwards; set sparsity to 0 to drop experts "
            "only. To drop more than half, set yes.",
        ),
    ] = None
    rules: Annotated[
        tuple[str, ...],
        Option(
            "Another sparsity for matrices whose tensor's name a regular expression "
            "matches, such as 'down_proj=70%'; may be repeated.",
            TARGET,
            flags=("--rule",),
            metavar="REGEX=SPARSITY",
            unset="none",
            details="The expression may match any part of the name; the last rule that "
            "matches counts. A rule that matches nothing is refused.",
        ),
    ] = ()
    skip: Annotated[
        tuple[str, ...],
        Option(
            "Leave matrices as they are whose tensor's name a regular expression "
            "matches; may be repeated.",
            TARGET,
            metavar="REGEX",
            unset="none",
        ),
    ] = ()
    matmul_precision: Annotated[
        str,
        Option(
            "Precision of products in passes through the blocks, on CUDA: highest is "
            "float32; high is TF32, which tensor cores compute.",
            RESOURCES,
            choices=PRECISION_CHOICES,
            details="TF32 rounds the factors to 11 significant bits, as float16 does. "
            "Gram matrices, solvers and gradients are computed in float32 in any case. "
            "Refused on the CPU, where it would change nothing.",
        ),
    ] = "highest"


class PruneKeywords(RunKeywords, total=False):
    """The fields of `PruneOptions` and `RunOptions` as keywords."""

    sparsity: str | float
    solver: str
    calibration: str
    samples: int
    self_samples: str | float
    seq_len: int | None
    seed: int
    bos: str
    damping: float
    ridge: float | None
    importance_samples: int | None
    block_size: int
    device: str
    packed: bool
    refit: bool
    sequential: bool | None
    refine: bool
    epochs: int
    quantize: str | None
    group_size: int
    symmetric: bool
    quantize_head: str
    target_bits: float | None
    allocation: str
    experts: str | float | None
    rules: tuple[str, ...]
    skip: tuple[str, ...]
    matmul_precision: str
