"""Halve prunes large language models in one shot and measures what was lost.

    import halve
    halve.plan("facebook/opt-125m", sparsity="2:4")
    halve.prune("facebook/opt-125m", "out", sparsity="2:4", calibration="wikitext2")
    halve.perplexity("out", data="wikitext2")
    halve.recover("out", "facebook/opt-125m", "out2", calibration="wikitext2")
    halve.inspect("out")
    halve.verify("out")
    halve.pack("out", "out-packed")
    halve.report("out")

Names are loaded on first use, so `import halve` is fast. transformers' own
`from_pretrained` loads packed models and runs them with Halve's kernels, wherever Halve
is installed; with TORCH_DEVICE_BACKEND_AUTOLOAD=0, only after `import halve`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halve.integrations.transformers.hook import register_with_transformers

if TYPE_CHECKING:
    from halve.api import (
        bench,
        compare,
        evaluate_tasks,
        generate,
        inspect,
        pack,
        perplexity,
        plan,
        prune,
        recover,
        report,
        unpack,
        verify,
    )
    from halve.errors import (
        CalibrationError,
        CheckpointError,
        DistributedError,
        HalveError,
        HalveWarning,
        NumericalError,
        OutputError,
        PatternError,
        QuantizationError,
        RecordError,
        SourceError,
        TargetMissedError,
        UnsupportedModelError,
    )
    from halve.integrations.notebook import ProgressBar
    from halve.integrations.transformers.keep_zeros_callback import KeepZerosCallback
    from halve.options import (
        BenchOptions,
        EvalOptions,
        GenerateOptions,
        PruneOptions,
        RecoverOptions,
        ReportOptions,
        RunOptions,
        TaskOptions,
    )
    from halve.pruning import DryRun, Forecast
    from halve.pruning.plan import Plan
    from halve.records import (
        BenchRecord,
        ComparisonRecord,
        Inspection,
        PackRecord,
        PerplexityRecord,
        Progress,
        PruneRecord,
        RecoverRecord,
        TasksRecord,
        Verification,
    )
    from halve.runtime.generation import load
    from halve.runtime.keep_zeros import keep_zeros

    __version__: str

# Public name -> module that defines it.
_HOMES = {
    "BenchOptions": "halve.options",
    "BenchRecord": "halve.records",
    "CalibrationError": "halve.errors",
    "CheckpointError": "halve.errors",
    "ComparisonRecord": "halve.records",
    "DistributedError": "halve.errors",
    "DryRun": "halve.pruning",
    "EvalOptions": "halve.options",
    "Forecast": "halve.pruning",
    "GenerateOptions": "halve.options",
    "HalveError": "halve.errors",
    "HalveWarning": "halve.errors",
    "Inspection": "halve.records",
    "KeepZerosCallback": "halve.integrations.transformers.keep_zeros_callback",
    "NumericalError": "halve.errors",
    "OutputError": "halve.errors",
    "PackRecord": "halve.records",
    "PatternError": "halve.errors",
    "PerplexityRecord": "halve.records",
    "Plan": "halve.pruning.plan",
    "Progress": "halve.records",
    "ProgressBar": "halve.integrations.notebook",
    "PruneOptions": "halve.options",
    "PruneRecord": "halve.records",
    "QuantizationError": "halve.errors",
    "RecordError": "halve.errors",
    "RecoverOptions": "halve.options",
    "RecoverRecord": "halve.records",
    "ReportOptions": "halve.options",
    "RunOptions": "halve.options",
    "SourceError": "halve.errors",
    "TargetMissedError": "halve.errors",
    "TaskOptions": "halve.options",
    "TasksRecord": "halve.records",
    "UnsupportedModelError": "halve.errors",
    "Verification": "halve.records",
    "bench": "halve.api",
    "compare": "halve.api",
    "evaluate_tasks": "halve.api",
    "generate": "halve.api",
    "inspect": "halve.api",
    "keep_zeros": "halve.runtime.keep_zeros",
    "load": "halve.runtime.generation",
    "pack": "halve.api",
    "perplexity": "halve.api",
    "plan": "halve.api",
    "prune": "halve.api",
    "recover": "halve.api",
    "report": "halve.api",
    "unpack": "halve.api",
    "verify": "halve.api",
}

__all__ = [
    "BenchOptions",
    "BenchRecord",
    "CalibrationError",
    "CheckpointError",
    "ComparisonRecord",
    "DistributedError",
    "DryRun",
    "EvalOptions",
    "Forecast",
    "GenerateOptions",
    "HalveError",
    "HalveWarning",
    "Inspection",
    "KeepZerosCallback",
    "NumericalError",
    "OutputError",
    "PackRecord",
    "PatternError",
    "PerplexityRecord",
    "Plan",
    "Progress",
    "ProgressBar",
    "PruneOptions",
    "PruneRecord",
    "QuantizationError",
    "RecordError",
    "RecoverOptions",
    "RecoverRecord",
    "ReportOptions",
    "RunOptions",
    "SourceError",
    "TargetMissedError",
    "TaskOptions",
    "TasksRecord",
    "UnsupportedModelError",
    "Verification",
    "bench",
    "compare",
    "evaluate_tasks",
    "generate",
    "inspect",
    "keep_zeros",
    "load",
    "pack",
    "perplexity",
    "plan",
    "prune",
    "recover",
    "report",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__version__":
        return import_module("importlib.metadata").version("halve")
    if name not in _HOMES:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_transformers()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
