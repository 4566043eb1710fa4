"""Measure what a model predicts: its perplexity, its divergence, scores in tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from halve.api.keywords import takes, with_keywords
from halve.evaluation import compare as compare_models
from halve.evaluation import evaluate
from halve.measure import find_tasks, score_tasks
from halve.options import EvalKeywords, EvalOptions, TaskKeywords, TaskOptions
from halve.records import ComparisonRecord, PerplexityRecord, TasksRecord


@takes(EvalOptions)
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
    return evaluate(model, with_keywords(options or EvalOptions(), keywords))


@takes(EvalOptions)
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
    return compare_models(
        model, reference, with_keywords(options or EvalOptions(), keywords)
    )


@takes(TaskOptions)
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
    merged = with_keywords(options or TaskOptions(), keywords)
    found = find_tasks(tasks, merged)
    scores = [
        score_tasks(each, found, device, trust_remote_code)
        for each in (model, reference)
        if each is not None
    ]
    return TasksRecord(*scores)
