"""The verbs as functions, each with a docstring that is a contract."""

from collections.abc import Callable
from pathlib import Path

from halve.evaluation import evaluate
from halve.measure import inspect_model, verify_output
from halve.options import EvalOptions, PackOptions, PruneOptions, RunOptions
from halve.packing import pack_model, unpack_model
from halve.pruning import prune_model
from halve.records import (
    Inspection,
    PackRecord,
    PerplexityRecord,
    Progress,
    PruneRecord,
    Verification,
)


def prune(  # noqa: PLR0913  (the options of the command line, one for one)
    model: str | Path,
    out: str | Path,
    *,
    sparsity: str | float = "50%",
    solver: str = "auto",
    calibration: str = "c4",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    damping: float = 0.01,
    block_size: int = 128,
    device: str = "auto",
    activation_memory: int | None = None,
    memory: int | None = None,
    packed: bool = False,
    refit: bool = False,
    sequential: bool | None = None,
    refine: bool = False,
    epochs: int = 3,
    quantize: str | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    target_bits: float | None = None,
    allocation: str = "uniform",
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PruneRecord:
    """Prune a causal language model in one shot into a new folder.

    The new folder has the model's tensor names, dtypes, config, tokenizer and
    generation files, and loads in plain transformers. Every linear layer of every
    block then has the sparsity asked for: exactly `floor(weights * sparsity)` zeros or
    more, or n kept of every m (with `allocation="error"` the whole model has it, and
    matrices their shares); that is read back from the files before they count.
    Embeddings, norms and the head are copied as they are.

    `out` is absent or whole. Until the end the work lies in `OUT.partial`; the same
    call goes on there after any interruption and ends in the same bytes (`halve.json`,
    which holds times, apart). Called again on a finished folder it changes nothing.

    Where the memory of a GPU is exhausted, the batch is halved, a HalveWarning says so,
    and the run goes on after the last shard. The result is then not, to the bit, what
    another batch gives: sums are rounded otherwise, and refining takes smaller steps.

    Args:
        model: A folder with a checkpoint of transformers (safetensors or
            pytorch_model.bin, whole or in shards), or a name on the hub.
        out: The new folder; must not exist, or be empty.
        sparsity: A share (`0.5`, `"50%"`) or n kept of every m inputs (`"2:4"`).
        solver: `auto`, `admm`, `sparsegpt`, `wanda` or `magnitude` (docs/solvers.md).
            `auto` keeps a sixteenth of the windows apart and takes, for each matrix,
            the solution of `admm` or of `wanda` with refit, by those.
        calibration: `c4`, `wikitext2`, `ptb`, a data set of the hub, a .txt, .jsonl
            or .parquet file, `stdlib` (this Python's own sources), or `self` (text
            sampled from the model, which then must fit into memory).
        samples: Calibration windows.
        seq_len: Tokens in each; by default the model's longest, 2048 at most.
        seed: Draws the windows.
        damping: Share of the mean diagonal added to Gram matrices.
        block_size: Columns that SparseGPT handles at once.
        device: `cpu`, `cuda` or `auto`.
        activation_memory: Bytes of hidden states kept in memory before they go to a
            mapped file; by default a quarter of the machine's.
        memory: Bytes that the whole process may take; decides where hidden states
            live and whether a block's widest inputs are summed later, from a mapped
            file. Refused where the rest alone takes more. Changes no result.
        packed: Whether to store the pruned matrices packed, as `pack` does.
        refit: Whether the kept weights are tuned by conjugate gradients once the mask
            is chosen; the layer error never rises. `admm` does that by itself.
        sequential: Whether the matrices of a block are pruned in the order in which
            data meets them, each so that its outputs come near to the dense model's
            although its inputs are the pruned model's. By default for `auto` and
            `admm` only.
        refine: Whether each block, once pruned, is tuned (kept weights, biases, norms)
            to the outputs of the dense one. A sixteenth of the windows is kept apart,
            and what is best on those stays: never worse than without.
        epochs: Passes over the windows for that.
        quantize: `int8`, `int4`, `int3` or `int2`: the kept weights are rounded to a
            grid of so many bits, each loss made up for by the weights that are rounded
            later; `sparsity` may be 0 then. The new folder holds the values, in the
            dtype of the model, and `halve.json` the grid.
        group_size: Weights of a row that share a scale.
        symmetric: Whether grids go without zero points.
        target_bits: Bits a weight, mask and scales included, instead of a sparsity and
            a grid: both are chosen for each matrix by windows kept apart.
        allocation: How an unstructured sparsity is shared out over the blocks:
            `uniform`, every matrix alike; or `error`, blocks that suffer more are
            pruned less, if that loses less on windows kept apart. The zeros of the
            whole model are then `floor(weights * sparsity)`, to the last one.
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each phase of each block.

    Returns:
        What was done, as in `OUT/halve.json`.

    Raises:
        HalveError: Whatever a user can put right, in two sentences.

    Cost:
        Memory: one block's weights as they are stored; the Gram matrices of one block,
        each columns^2 floats; one matrix in float32 (`sparsegpt`; others a dozen); the
        hidden states, samples * seq_len * width floats, in memory or on disk; whatever
        the depth of the model. Time: two passes of the windows through the model,
        tokens * columns^2 operations for each Gram matrix, and about (rows + columns) *
        columns^2 for each matrix. `sequential` and `refine`: the hidden states twice;
        `sequential` besides the dense inputs of one block's matrices, in memory or on
        disk, and a third square matrix for each input; about two passes more.
        `refine`: three passes an epoch. `allocation="error"`: two to four runs of
        `sparsegpt` first, with nothing written.

    Source:
        Frantar and Alistarh, "SparseGPT" (2023), algorithm 1; for wanda, Sun et al.
        (2023), equation 1; for admm, Meng et al., "ALPS" (2024), algorithm 1.
    """
    options = PruneOptions(
        sparsity=sparsity,
        solver=solver,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        damping=damping,
        block_size=block_size,
        device=device,
        packed=packed,
        refit=refit,
        sequential=sequential,
        refine=refine,
        epochs=epochs,
        quantize=quantize,
        group_size=group_size,
        symmetric=symmetric,
        target_bits=target_bits,
        allocation=allocation,
    )
    run_options = RunOptions(
        activation_memory, memory, trust_remote_code, progress or (lambda _: None)
    )
    return prune_model(model, out, options, run_options)


def pack(
    model: str | Path,
    out: str | Path,
    *,
    positive_zeros: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PackRecord:
    """Store a pruned model's matrices as a bit mask and the weights that are kept.

    The new folder holds the same model in fewer bytes: at 50 % zeros, 16-bit matrices
    take 56.3 % of what they took. It loads in transformers after `import halve` and
    runs as it is; without Halve, transformers refuses it. A matrix that would not get
    smaller (under about 6 % zeros in 16 bits) stays dense, as do embeddings, norms and
    the head. Every matrix is read back from the files and compared bit for bit.

    As with `prune`, `out` is absent or whole, and the same call goes on after any
    interruption.

    Args:
        model: A folder or a name on the hub.
        out: The new folder; must not exist, or be empty.
        positive_zeros: Whether minus zeros become zeros first. They arise where weights
            were multiplied by a mask; otherwise they are kept, bit for bit, and take
            their room.
        trust_remote_code: Whether Python code that comes with the model may run.
        progress: Told of each file.

    Returns:
        How each matrix is stored, as in `OUT/halve.json`.

    Raises:
        HalveError: Whatever a user can put right; also where nothing would get smaller.

    Cost:
        Reads and writes every tensor once; memory for the largest block, twice.

    Source:
        docs/format.md.
    """
    show = progress or (lambda _: None)
    rewriting = PackOptions(positive_zeros, trust_remote_code, show)
    return pack_model(model, out, rewriting)


def unpack(
    model: str | Path,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PackRecord:
    """Store a packed model dense, for programs that know nothing of Halve.

    `unpack(pack(m)) == m`, bit for bit. Arguments, errors and cost as for `pack`.
    """
    show = progress or (lambda _: None)
    rewriting = PackOptions(False, trust_remote_code, show)
    return unpack_model(model, out, rewriting)


def perplexity(  # noqa: PLR0913  (the options of the command line, one for one)
    model: str | Path,
    *,
    data: str = "wikitext2",
    seq_len: int | None = None,
    segments: int | None = None,
    device: str = "auto",
    activation_memory: int | None = None,
    trust_remote_code: bool = False,
) -> PerplexityRecord:
    """Judge a model on a text by the protocol of the SparseGPT paper.

    The text is joined, cut into segments that do not overlap, and run through the
    model block by block in float32; the perplexity is exp of the mean over segments of
    a segment's mean loss. Figures of different sequence lengths must not be compared.

    Args:
        model: A folder or a name on the hub.
        data: `wikitext2` (test part, joined by blank lines), `ptb` (test part), `c4`
            (first 1100 documents of the validation part, 256 segments), `stdlib`
            (modules of this Python's library held out by hash), a data set of the hub
            or a file.
        seq_len: Tokens in a segment; by default the model's longest, 2048 at most.
        segments: At most so many, from the beginning; by default all.
        device: `cpu`, `cuda` or `auto`.
        activation_memory: Bytes of hidden states kept in memory before they go to a
            mapped file; by default a quarter of the machine's.
        trust_remote_code: Whether Python code that comes with the model may run.

    Returns:
        Perplexity, its standard error from the spread of the segments, and what it was
        measured on.

    Raises:
        HalveError: Whatever a user can put right, in two sentences.

    Cost:
        Memory as for `prune`, less the Gram matrices. Time: one pass of the text.
    """
    options = EvalOptions(
        data=data,
        seq_len=seq_len,
        segments=segments,
        device=device,
        activation_memory=activation_memory,
        trust_remote_code=trust_remote_code,
    )
    return evaluate(model, options)


def inspect(model: str | Path, *, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model's files: sparsity and pattern of every prunable matrix.

    Args:
        model: A folder or a name on the hub.
        trust_remote_code: Whether Python code that comes with the model may run.

    Returns:
        For each matrix its shape, dtype, share of zeros, tightest pattern, bytes, and
        whether it is packed;
        for the whole model its parameters, zeros and bytes.

    Raises:
        HalveError: Whatever a user can put right, in two sentences.

    Cost:
        Reads every tensor once; memory for one tensor at a time.
    """
    return inspect_model(model, trust_remote_code)


def verify(out: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Check a folder that Halve has made against what was written and promised.

    Every file that was written is compared with its SHA-256 in `halve.json`, and that
    file with its own: a flipped bit or a cut byte is found in any of them. Where all
    are the same, every matrix is counted: its zeros, its n:m pattern, and whether its
    values lie on the grid that it was rounded to. Files that were added and that no
    one loads are not looked at. It tells damage, not forgery: there is no signature.

    Args:
        out: A folder that `prune`, `pack` or `unpack` has made, or a name on the hub.
        trust_remote_code: Whether Python code that comes with the model may run.

    Returns:
        What was checked, and a finding for each file or matrix that is not as it should
        be; `sound` where there is none.

    Raises:
        CheckpointError: `halve.json` is not there, or is itself not what was written,
            so that nothing can be held against it.
        HalveError: Whatever a user can put right, in two sentences.

    Cost:
        Reads every file twice; memory for one tensor at a time.
    """
    return verify_output(out, trust_remote_code)
