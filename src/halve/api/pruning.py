"""Prune a model, or forecast what that would take."""

from dataclasses import fields
from pathlib import Path
from typing import Unpack

from halve.api.keywords import takes, with_keywords
from halve.options import PruneKeywords, PruneOptions, RunOptions
from halve.pruning import DryRun, dry_run, prune_model
from halve.records import PruneRecord


@takes(PruneOptions, RunOptions)
def prune(
    model: str | Path,
    out: str | Path,
    *,
    options: PruneOptions | None = None,
    run_options: RunOptions | None = None,
    **keywords: Unpack[PruneKeywords],
) -> PruneRecord:
    """Prune a causal language model in one shot into a new folder.

    The new folder has the model's tensor names, dtypes, config, tokenizer and
    generation files, and loads in plain transformers. Every linear layer of every
    block then has the requested sparsity: at least `floor(weights * sparsity)` zeros,
    or n nonzeros in every m (with `allocation="error"` the whole model has that number
    of zeros, and each matrix a fraction chosen for it). This is verified by reading
    every file back before it is committed. Embeddings, norms and the head are copied
    unchanged.

    `out` is either absent or complete. Until the end the work lies in `OUT.partial`;
    after any interruption the same call resumes there and ends in the same bytes
    (except `halve.json`, which holds times). Called again on a finished folder it
    changes nothing.

    If the memory of a GPU is exhausted, the batch is halved, a HalveWarning says so,
    and the run continues after the last committed shard. The result is then not
    bit-identical to that of another batch size: sums are rounded differently, and
    refining takes smaller steps.

    Args:
        model: A folder with a transformers checkpoint (safetensors or
            pytorch_model.bin, whole or in shards), or a name on the Hub.
        out: The new folder; must not exist, or be empty.
        options: What to do; by default `PruneOptions()`.
        run_options: Memory, trust and progress; by default `RunOptions()`.
        **keywords: Fields of either, which override those of the objects.

    Returns:
        The record of the run, which `OUT/halve.json` contains too.

    Raises:
        HalveError: Any error that you can fix; the message says what is wrong and what
            to do.

    Cost:
        Memory: one block's weights as they are stored; the Gram matrices of one block,
        each columns^2 floats; one matrix in float32 (`sparsegpt`; a dozen for others);
        the hidden states, samples * seq_len * width floats, in memory or on disk. None
        of it depends on the depth of the model. Time: two passes of the windows through
        the model, tokens * columns^2 operations for each Gram matrix, and about
        (rows + columns) * columns^2 for each matrix. `sequential` and `refine` hold the
        hidden states twice; `sequential` also holds the dense inputs of one block's
        matrices, in memory or on disk, and a third square matrix for each input, and
        takes about two passes more. `refine` takes three passes per epoch.
        `allocation="error"` first takes two to four runs of `sparsegpt`, which write
        nothing.

    Source:
        Frantar and Alistarh, "SparseGPT" (2023), algorithm 1; for wanda, Sun et al.
        (2023), equation 1; for admm, Meng et al., "ALPS" (2024), algorithm 1.
    """
    return prune_model(model, out, *_split(options, run_options, keywords))


@takes(PruneOptions, RunOptions)
def plan(
    model: str | Path,
    *,
    options: PruneOptions | None = None,
    run_options: RunOptions | None = None,
    **keywords: Unpack[PruneKeywords],
) -> DryRun:
    """Plan a call of `prune` and forecast its cost, without reading a weight.

    Only the config and the headers of the files are read; the config alone if the
    folder has no weights. Nothing is written.

    Args:
        model: A folder or a name on the Hub, whose weights are not downloaded.
        options: What to do; by default `PruneOptions()`.
        run_options: Memory and trust; by default `RunOptions()`.
        **keywords: Fields of either, which override those of the objects.

    Returns:
        The plan, the peak memory of every phase, the disk space, and the estimated
        duration on this machine (to about a factor of two).

    Raises:
        HalveError: Any error of `prune` that can be detected before a weight is read:
            an invalid option, an unsupported model, a damaged header, a pattern that
            does not fit a matrix, or a memory limit that is too low.

    Cost:
        Builds the model without weights, and a tenth of a second of matrix products to
        measure this machine's speed.
    """
    return dry_run(model, *_split(options, run_options, keywords))


def _split(
    options: PruneOptions | None,
    run_options: RunOptions | None,
    keywords: PruneKeywords,
) -> tuple[PruneOptions, RunOptions]:
    """Return both kinds of options, each with the keywords that are its fields."""
    names = {field.name for field in fields(RunOptions)}
    run = {name: value for name, value in keywords.items() if name in names}
    rest = {name: value for name, value in keywords.items() if name not in names}
    return (
        with_keywords(options or PruneOptions(), rest),
        with_keywords(run_options or RunOptions(), run),
    )
