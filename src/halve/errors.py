"""The errors and warnings that Halve raises for what a user can fix.

Every message has two sentences: what was found, and what to do about it.
"""


class HalveError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do.

    Args:
        problem: One sentence: what was found, and what was expected.
        remedy: One sentence: what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message, without the calls that led to it.

        IPython looks for this name.
        """
        return [f"{type(self).__name__}: {self}"]

    def __reduce__(self) -> tuple[type["HalveError"], tuple[str, str]]:
        """Pickle by both sentences, so that it survives a process boundary."""
        return type(self), (self.problem, self.remedy)


class HalveWarning(UserWarning):
    """Something that works, but not as well as a user would expect."""


class SourceError(HalveError):
    """A model or text that cannot be found or downloaded."""


class UnsupportedModelError(HalveError):
    """A model whose blocks or matrices Halve cannot prune."""


class CheckpointError(HalveError):
    """A checkpoint that is damaged, incomplete, or contradicts its config."""


class RecordError(HalveError):
    """A `halve.json` in a format that this version of Halve does not read."""


class CalibrationError(HalveError):
    """Calibration or evaluation text that is too short, or cannot be read."""


class PatternError(HalveError):
    """A sparsity pattern, or a fraction of experts, that is invalid or does not fit."""


class QuantizationError(HalveError):
    """A quantization scheme that is invalid, or does not fit a matrix."""


class NumericalError(HalveError):
    """Weights, activations or Gram matrices that are not finite or not solvable."""


class OutputError(HalveError):
    """An output folder that cannot be written, or must not be."""


class TargetMissedError(HalveError):
    """A written matrix that does not have the requested sparsity or pattern."""


class DistributedError(HalveError):
    """Processes of one run that cannot work together, or one that has ended."""


class ReportedError(DistributedError):
    """An error of another process of the run, which reports it itself."""
