"""Write a page about an output, and measure first what the page shows."""

from pathlib import Path
from typing import Unpack

import torch

from halve.api.benchmark import bench
from halve.api.keywords import takes, with_keywords
from halve.checkpoint import resolve_model
from halve.completion import Completer
from halve.errors import HalveError
from halve.evaluation import compare as compare_models
from halve.evaluation import compare_passage
from halve.measure import check_keepable, keep_measurement, read_task_scores
from halve.options import (
    BenchOptions,
    EvalOptions,
    GenerateOptions,
    ReportKeywords,
    ReportOptions,
)
from halve.records import (
    ContinuationRecord,
    GeneratedToken,
    Progress,
    SamplesRecord,
    TasksRecord,
)
from halve.reporting import dense_name, gather_facts, output_folder, write_report

# New tokens of each text that two models continue for a report.
_CONTINUED = 48


@takes(ReportOptions)
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
    merged = with_keywords(options or ReportOptions(), keywords)
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
