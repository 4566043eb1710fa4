"""The options of every command, each declared once; one module a command.

A field's annotation carries its help text, unit, choices and heading (`Option`). The
command line, the keywords of the Python functions and `docs/api/options.md` are built
from these classes or tested against them. Importing this package loads neither torch
nor typer, so that `halve --help` is fast and a wrong option is reported at once.
"""

from halve.options.bench import BenchKeywords, BenchOptions
from halve.options.choices import QUANTIZE_CHOICES, SOLVER_CHOICES
from halve.options.evaluation import EvalKeywords, EvalOptions
from halve.options.generate import GenerateKeywords, GenerateOptions
from halve.options.pack import PackOptions
from halve.options.presets import PRESETS, preset_options
from halve.options.prune import PruneOptions
from halve.options.prune_fields import PruneKeywords
from halve.options.recover import RecoverKeywords, RecoverOptions
from halve.options.report import ReportKeywords, ReportOptions
from halve.options.run import RunKeywords, RunOptions
from halve.options.shared import Activations, Device, TrustRemoteCode, check_device
from halve.options.tasks import TaskKeywords, TaskOptions

__all__ = [
    "PRESETS",
    "QUANTIZE_CHOICES",
    "SOLVER_CHOICES",
    "Activations",
    "BenchKeywords",
    "BenchOptions",
    "Device",
    "EvalKeywords",
    "EvalOptions",
    "GenerateKeywords",
    "GenerateOptions",
    "PackOptions",
    "PruneKeywords",
    "PruneOptions",
    "RecoverKeywords",
    "RecoverOptions",
    "ReportKeywords",
    "ReportOptions",
    "RunKeywords",
    "RunOptions",
    "TaskKeywords",
    "TaskOptions",
    "TrustRemoteCode",
    "check_device",
    "preset_options",
]
