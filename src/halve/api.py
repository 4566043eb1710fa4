"""The verbs of Halve as functions, whose docstrings are their contracts.

Options are declared in `halve.options` alone. `prune`, `plan`, `perplexity`,
`compare`, `recover`, `bench`, `generate` and `report` accept an options object, or its
fields as keywords, or both; then the keywords override the object's fields.
"""

import inspect as introspection
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, Unpack, cast

import torch

from halve.checkpoint import Checkpoint, resolve_model
from halve.completion import Completer
from halve.errors import HalveError
from halve.evaluation import compare as compare_models
from halve.evaluation import compare_passage, evaluate
from halve.measure import (
    BenchModels,
    check_keepable,
    find_tasks,
    inspect_model,
    keep_measurement,
    read_task_scores,
    run_bench,
    score_tasks,
    verify_output,
    write_random_model,
)
from halve.option import describe_options
from halve.options import (
    BenchKeywords,
    BenchOptions,
    EvalKeywords,
    EvalOptions,
    GenerateKeywords,
    GenerateOptions,
    PackOptions,
    PruneKeywords,
    PruneOptions,
    RecoverKeywords,
    RecoverOptions,
    ReportKeywords,
    ReportOptions,
    RunOptions,
    TaskKeywords,
    TaskOptions,
)
from halve.packing import pack_model, unpack_model
from halve.patterns import parse_pattern
from halve.pruning import DryRun, dry_run, prune_model
from halve.records import (
    BenchRecord,
    ComparisonRecord,
    ContinuationRecord,
    GeneratedToken,
    Inspection,
    PackRecord,
    PerplexityRecord,
    Progress,
    PruneRecord,
    RecoverRecord,
    SamplesRecord,
    TasksRecord,
    Verification,
)
from halve.recovery import recover_model
from halve.reporting import dense_name, gather_facts, output_folder, write_report
from halve.runtime.blockwise_model import choose_device

# New tokens of each text that two models continue for a report.
_CONTINUED = 48

_Function = TypeVar("_Function", bound=Callable)
_Options = TypeVar(
    "_Options",
    PruneOptions,
    RunOptions,
    EvalOptions,
    BenchOptions,
    GenerateOptions,
    RecoverOptions,
    ReportOptions,
    TaskOptions,
)


def _takes(*classes: type) -> Callable[[_Function], _Function]:
    """Return a decorator that shows the fields of options classes in `help()`.

    The signature gets one keyword for each field, with its default, in the place of
    `**keywords`; the docstring gets the help of each.
    """

    def decorate(function: _Function) -> _Function:
        signature = introspection.signature(function)
        positional = [p for p in signature.parameters.values() if p.name != "keywords"]
        keywords = [
            introspection.Parameter(
                field.name,
                introspection.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for options in classes
            for field in fields(options)
        ]
        shown = signature.replace(parameters=[*positional, *keywords])
        documentation = introspection.getdoc(function)
        described = f"{documentation}\n\nKeywords:\n{describe_options(*classes)}\n"
        function.__doc__ = described
        cast("Any", function).__signature__ = shown
        return function

    return decorate


def _merged(options: _Options, keywords: Any) -> _Options:  # noqa: ANN401
    """Return options with the fields replaced that keywords name.

    Raises:
        TypeError: There is no such keyword.
    """
    return replace(options, **keywords)


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
        _merged(options or PruneOptions(), rest),
        _merged(run_options or RunOptions(), run),
    )


@_takes(PruneOptions, RunOptions)
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


@_takes(PruneOptions, RunOptions)
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


@_takes(RecoverOptions)
def recover(
    model: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    options: RecoverOptions | None = None,
    **keywords: Unpack[RecoverKeywords],
) -> RecoverRecord:
    """Train the kept weights of a pruned model to predict as the dense model does.

    The loss is KL(reference || model) of the predictions for every token of windows of
    text, at temperature 1; there are no labels. All parameters of the blocks and the
    final norm are trained by AdamW without weight decay, in float32. Embeddings, the
    head, and matrices that lie on a quantization grid keep their values, so of a model
    that is quantized only norms and biases are trained. Zeros stay zero: the output has
    exactly those of the input, and is packed if the input is.

    Sixteen times in a run the weights, rounded to their dtypes, are judged on held-out
    windows of other documents, and the best state is stored. If none is better than the
    input, the output has the input's weights, bit for bit, and a HalveWarning says so.

    As with `prune`, `out` is either absent or complete, and the same call resumes after
    any interruption, from the last state that was judged, to the same bytes.

    Args:
        model: The pruned model, dense or packed: a folder or a name on the Hub.
        reference: The dense model; any model of the same vocabulary is accepted.
        out: The new folder; must not exist, or be empty.
        options: Text, steps and learning rate; by default `RecoverOptions()`.
        **keywords: Fields of `RecoverOptions`, which override those of the object.

    Returns:
        The record of the run, which `OUT/halve.json` contains too.

    Raises:
        NumericalError: The loss is not finite; a lower learning rate may help.
        HalveError: Any other error that you can fix.

    Cost:
        Memory: 16 bytes for each trained parameter (its value and gradient in float32,
        Adam's two moments), two for the best state, a byte for each weight of a matrix,
        and the dense model as it is stored; of activations, the inputs of all blocks
        and one block's for 1024 tokens, or one window, and their logits about six
        times. Disk: as much again twice, until the run ends. Time: about five forward
        passes of both models for each step's windows.

    Source:
        Hinton et al. (2015), with the dense model as the teacher and no labels.
    """
    merged = _merged(options or RecoverOptions(), keywords)
    return recover_model(model, reference, out, merged)


def pack(
    model: str | Path,
    out: str | Path,
    *,
    positive_zeros: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PackRecord:
    """Store each matrix of a pruned model as a bit mask and its nonzero weights.

    The new folder holds the same model in fewer bytes: at 50 % zeros, 16-bit matrices
    take 56.3 % of their dense size. It loads in transformers where Halve is installed,
    and runs without being unpacked; without Halve, transformers refuses it. A matrix
    that packing would not shrink (under about 6 % zeros in 16 bits) stays dense, as do
    embeddings, norms and the head. Every matrix is read back from the files and
    compared bit for bit.

    As with `prune`, `out` is either absent or complete, and the same call resumes after
    any interruption.

    Args:
        model: A folder or a name on the Hub.
        out: The new folder; must not exist, or be empty.
        positive_zeros: Turn negative zeros into zeros first. They result from
            multiplying weights by a mask; otherwise they are stored like any other
            weight, bit for bit, and take as many bytes.
        trust_remote_code: Allow Python code that comes with the model to run.
        progress: Called before each file.

    Returns:
        How each matrix is stored, which `OUT/halve.json` contains too.

    Raises:
        HalveError: Packing would shrink nothing, or any other error that you can fix.

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
    """Store a packed model dense, for programs that do not support Halve's format.

    `unpack(pack(m)) == m`, bit for bit. A model in FP8, MXFP4 or a format of
    compressed-tensors that Halve reads becomes bfloat16. Arguments, errors and cost as
    for `pack`.
    """
    show = progress or (lambda _: None)
    rewriting = PackOptions(False, trust_remote_code, show)
    return unpack_model(model, out, rewriting)


@_takes(EvalOptions)
def perplexity(
    model: str | Path,
    *,
    options: EvalOptions | None = None,
    **keywords: Unpack[EvalKeywords],
) -> PerplexityRecord:
    """Measure a model's perplexity on a text by the protocol of the SparseGPT paper.

    The text is joined, cut into segments that do not overlap, and run through the
    model block by block in float32; the perplexity is exp of the mean over segments of
    a segment's mean loss. Figures of different sequence lengths are not comparable.

    Args:
        model: A folder or a name on the Hub.
        options: Text, length and device; by default `EvalOptions()`.
        **keywords: Fields of `EvalOptions`, which override those of the object.

    Returns:
        The perplexity, its standard error from the variation between segments, and
        what it was measured on.

    Raises:
        HalveError: Any error that you can fix; the message says what is wrong and what
            to do.

    Cost:
        Memory as for `prune`, without the Gram matrices. Time: one pass of the text.
    """
    return evaluate(model, _merged(options or EvalOptions(), keywords))


@_takes(EvalOptions)
def compare(
    model: str | Path,
    reference: str | Path,
    *,
    options: EvalOptions | None = None,
    **keywords: Unpack[EvalKeywords],
) -> ComparisonRecord:
    """Measure how far a model's predictions diverge from those of a reference.

    Both models predict every token of the same segments, as in `perplexity`.

    Args:
        model: The model to judge, a folder or a name on the Hub.
        reference: The model to compare it with, usually the dense one.
        options: Text, length and device; by default `EvalOptions()`.
        **keywords: Fields of `EvalOptions`, which override those of the object.

    Returns:
        The perplexity of both, KL(reference || model) in nats per token (mean, median
        and 99th percentile), and the fraction of tokens for which both predict the same
        most likely token.

    Raises:
        CalibrationError: The tokenizers differ, so that the segments do.
        HalveError: As in `perplexity`.

    Cost:
        Twice that of `perplexity`, in memory and time.
    """
    return compare_models(model, reference, _merged(options or EvalOptions(), keywords))


@_takes(TaskOptions)
def evaluate_tasks(
    model: str | Path,
    tasks: str | Sequence[str],
    reference: str | Path | None = None,
    *,
    options: TaskOptions | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    **keywords: Unpack[TaskKeywords],
) -> TasksRecord:
    """Score a model in tasks by lm-evaluation-harness (`pip install 'halve[tasks]'`).

    The figures are those of its own command on the same folder, `lm_eval --model hf
    --model_args pretrained=MODEL --tasks TASKS`.

    Args:
        model: A folder, dense or packed, or a name on the Hub.
        tasks: Names of tasks or groups, as `lm_eval ls tasks` lists them; separated by
            commas, or in a sequence.
        reference: The model to compare it with, usually the dense one.
        options: Examples in the prompt, and further tasks; by default `TaskOptions()`.
        device: `cpu`, `cuda` or `auto`.
        trust_remote_code: Allow Python code that comes with the model to run.
        **keywords: Fields of `TaskOptions`, which override those of the object.

    Returns:
        The score of each task with its standard error, of the model and of the
        reference; `recovery` is a score as a fraction of the reference's.

    Raises:
        SourceError: There is no such task, or it cannot be run, for instance since its
            data set cannot be downloaded.
        HalveError: lm-evaluation-harness is not installed, or whatever `load` raises.

    Cost:
        Memory for one whole model at a time; a packed one stays packed.
    """
    merged = _merged(options or TaskOptions(), keywords)
    found = find_tasks(tasks, merged)
    scores = [
        score_tasks(each, found, device, trust_remote_code)
        for each in (model, reference)
        if each is not None
    ]
    return TasksRecord(*scores)


@_takes(BenchOptions)
def bench(
    model: str | Path | None = None,
    *,
    options: BenchOptions | None = None,
    **keywords: Unpack[BenchKeywords],
) -> BenchRecord:
    """Time a model dense in torch, dense in Halve's kernel, and packed.

    The rounds of the backends are interleaved, so that a change in the machine's speed
    affects all of them. On a GPU there are two: Halve has no kernel for dense weights
    there. The counterpart of the model, packed or dense, is written
    to a temporary folder.

    Args:
        model: A pruned model, dense or packed: a folder or a name on the Hub. None with
            `random_llama` or `random_opt`.
        options: What to measure; by default `BenchOptions()`.
        **keywords: Fields of `BenchOptions`, which override those of the object.

    Returns:
        Tokens per second of every backend in every test, the bytes of weights that a
        token reads, the memory bandwidth of the machine or of its GPU, and the peak
        memory of loading and running the model dense and packed.

    Raises:
        HalveError: Not exactly one model is named, or any other error that you can fix.

    Cost:
        Memory for the model dense and packed at once; disk for the counterpart.
    """
    merged = _merged(options or BenchOptions(), keywords)
    merged.check()
    with (
        _threads(merged.threads),
        _model(model, merged) as (name, source),
        _counterparts(source, merged) as (dense, packed),
    ):
        return run_bench(BenchModels(name, dense, packed), merged)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _model(
    model: str | Path | None, options: BenchOptions
) -> Iterator[tuple[str, Path]]:
    """Yield the name and folder of the model to time, a random one if requested."""
    if not options.names_one_model(model):
        raise HalveError(
            "Not exactly one model is named.",
            "Name a model, or set one of random_llama and random_opt (--random-llama, "
            "--random-opt).",
        )
    if model is not None:
        if options.quantize is not None:
            raise HalveError(
                f"{model} is timed as it is, and cannot be quantized for that.",
                "Omit quantize (--quantize), or time a random model.",
            )
        yield str(model), resolve_model(model)
        return
    sizes = {"llama": options.random_llama, "opt": options.random_opt}
    [(family, size)] = [
        (name, size) for name, size in sizes.items() if size is not None
    ]
    pattern = parse_pattern(options.sparsity, allow_dense=options.quantize is not None)
    with TemporaryDirectory(prefix="halve-bench-") as folder:
        source = Path(folder) / "random"
        source.mkdir()
        options.progress(f"generating a random {family} {size}")
        device = str(choose_device(options.device))
        write_random_model(source, family, size, pattern, device=device)
        name = f"random {family} {size}, {options.sparsity} zeros"
        if options.quantize is None:
            yield name, source
            return
        options.progress("quantizing it")
        quantized = PruneOptions(
            sparsity=options.sparsity,
            solver="magnitude",
            quantize=options.quantize,
            packed=True,
        )
        prune_model(source, Path(folder) / "quantized", quantized, RunOptions())
        rmtree(source)
        yield f"{name}, {options.quantize}", Path(folder) / "quantized"


@contextmanager
def _counterparts(source: Path, options: BenchOptions) -> Iterator[tuple[Path, Path]]:
    """Yield a model dense and packed; the one that is missing is temporary."""
    with TemporaryDirectory(prefix="halve-bench-") as folder:
        other = Path(folder) / "model"
        if Checkpoint.open(source).is_packed:
            options.progress("unpacking")
            unpack_model(source, other, PackOptions(False, options.trust_remote_code))
            yield other, source
        else:
            options.progress("packing")
            # Positive zeros take fewer bytes, and give the same products.
            pack_model(source, other, PackOptions(True, options.trust_remote_code))
            yield source, other


@_takes(GenerateOptions)
def generate(
    model: str | Path,
    prompt: str,
    *,
    options: GenerateOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    **keywords: Unpack[GenerateKeywords],
) -> str:
    """Return a prompt with its continuation, the most likely one by default.

    Args:
        model: A folder, dense or packed, or a name on the Hub.
        prompt: Text to continue.
        options: How tokens are chosen; by default `GenerateOptions()`.
        on_text: Called with each piece of the result as soon as it is known.
        **keywords: Fields of `GenerateOptions`, which override those of the object.

    Raises:
        HalveError: An option is invalid, the prompt is empty or longer than the model's
            context allows; and whatever `load` raises.

    Cost:
        Memory for the whole model; a packed one stays packed.
    """
    merged = _merged(options or GenerateOptions(), keywords)
    return Completer.open(model, merged).complete(prompt, on_text)


@_takes(ReportOptions)
def report(
    out: str | Path,
    *,
    options: ReportOptions | None = None,
    **keywords: Unpack[ReportKeywords],
) -> Path:
    """Write one page about an output: what was lost, where, its size, speed and origin.

    The page is a single HTML file without scripts that refers to nothing outside of
    itself. It shows what `halve.json` and `measurements.json` hold, and leaves out what
    was not measured; the same facts give the same bytes. Every file of the output is
    compared with its recorded SHA-256 first.

    Args:
        out: A folder that `prune`, `pack` or `unpack` wrote.
        options: What to measure first, and what to write; by default `ReportOptions()`.
        **keywords: Fields of `ReportOptions`, which override those of the object.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: A file is missing or damaged; no page is written.
        OutputError: The page cannot be written, or `card` would overwrite a README.md
            that Halve has not made.
        HalveError: As in `compare`, `generate` and `bench`, with `measure`.

    Cost:
        Reads every file once. With `measure`, that of `compare` and `bench`, of another
        pass of both models, and memory for one whole model at a time.
    """
    merged = _merged(options or ReportOptions(), keywords)
    merged.check()
    folder = output_folder(out)
    if merged.measures:
        measure_output(out, merged)
    facts = gather_facts(folder, merged.against)
    return write_report(folder, facts, merged.file, merged.card)


def measure_output(out: str | Path, options: ReportOptions) -> None:
    """Measure what a page shows of an output, and keep it there.

    Args:
        out: The output.
        options: What to measure, on which text, against which model.

    Raises:
        HalveError: As in `report`.
    """
    folder = check_keepable(out)
    if options.tasks is not None:
        dense = options.dense_tasks
        reference = () if dense is None else read_task_scores(dense)
        scores = TasksRecord(read_task_scores(options.tasks), reference)
        keep_measurement(folder, scores)
    if options.measure:
        _measure_losses(folder, options)
        if options.speed:
            bench_options = BenchOptions(
                device=options.device,
                trust_remote_code=options.trust_remote_code,
                progress=options.progress,
            )
            keep_measurement(folder, bench(folder, options=bench_options))


def _measure_losses(folder: Path, options: ReportOptions) -> None:
    """Keep the divergence from the dense model, and texts to read."""
    dense = options.against or _recorded_model(folder)
    resolve_model(dense)  # a wrong name is reported first

    def show(progress: Progress) -> None:
        options.progress(
            f"evaluating the {progress.phase}, block {progress.block + 1} of "
            f"{progress.blocks}"
        )

    evaluation = EvalOptions(
        data=options.data,
        seq_len=options.seq_len,
        segments=options.segments,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        progress=show,
    )
    keep_measurement(folder, compare_models(folder, dense, evaluation), dense)
    keep_measurement(folder, _samples(folder, dense, evaluation, options), dense)


def _recorded_model(folder: Path) -> str:
    """Return the name of the dense model that an output was made from.

    Raises:
        HalveError: It is not recorded.
    """
    name = dense_name(gather_facts(folder).pruned)
    if not name:
        raise HalveError(
            f"The record of {folder} does not name the dense model.",
            "Set against to the dense model (--against).",
        )
    return name


def _samples(
    folder: Path, dense: str, evaluation: EvalOptions, options: ReportOptions
) -> SamplesRecord:
    """Return a passage that two models predict, and texts that they continue."""
    passage = compare_passage(folder, dense, evaluation)
    continuations: tuple[ContinuationRecord, ...] = ()
    if options.continuations:
        # One model at a time is in memory.
        prompts, model = _continued(folder, passage.prompts, options)
        _, reference = _continued(dense, passage.prompts, options)
        continuations = tuple(map(ContinuationRecord, prompts, model, reference))
    return SamplesRecord(
        data=evaluation.data,
        passage=passage.tokens,
        continuations=continuations,
        bos=passage.bos,
        data_sha256=passage.data_sha256,
    )


def _continued(
    model: str | Path, prompts: torch.Tensor, options: ReportOptions
) -> tuple[list[str], list[tuple[GeneratedToken, ...]]]:
    """Return the texts of prompts, and the tokens with which a model continues them."""
    options.progress(f"generating with {model}")
    greedy = GenerateOptions(
        max_new_tokens=_CONTINUED,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    completer = Completer.open(model, greedy)
    texts = completer.tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return texts, [completer.tokens_after(prompt) for prompt in prompts]


def inspect(model: str | Path, *, trust_remote_code: bool = False) -> Inspection:
    """Count what is in a model's files: sparsity and pattern of every prunable matrix.

    Args:
        model: A folder or a name on the Hub.
        trust_remote_code: Allow Python code that comes with the model to run.

    Returns:
        For each matrix its shape, dtype, fraction of zeros, tightest pattern, bytes,
        and whether it is packed; for the whole model its parameters, zeros and bytes.

    Raises:
        HalveError: Any error that you can fix; the message says what is wrong and what
            to do.

    Cost:
        Reads every tensor once; memory for one tensor at a time.
    """
    return inspect_model(model, trust_remote_code)


def verify(out: str | Path, *, trust_remote_code: bool = False) -> Verification:
    """Check a folder that Halve wrote against its record, `halve.json`.

    Every file is compared with its SHA-256 in `halve.json`, and that file with its own
    checksum, so a flipped bit or a missing byte in any of them is detected. If all
    match, every matrix is checked: its zeros, its n:m pattern, and whether its values
    lie on the grid to which it was quantized. Files that were added and that nothing
    loads are ignored. This detects damage, not forgery: there is no signature.

    Args:
        out: A folder that `prune`, `pack` or `unpack` wrote, or a name on the Hub.
        trust_remote_code: Allow Python code that comes with the model to run.

    Returns:
        What was checked, and a finding for each file or matrix that differs; `sound` if
        there is none.

    Raises:
        CheckpointError: `halve.json` is missing, or itself damaged, so that nothing can
            be checked.
        HalveError: Any other error that you can fix.

    Cost:
        Reads every file twice; memory for one tensor at a time.
    """
    return verify_output(out, trust_remote_code)
