"""The one family of errors that Halve raises for what a user can meet.

Every message has two sentences: what was found, and what to do about it.
"""


class HalveError(Exception):
    """Something a user can put right.

    Args:
        problem: One sentence: what was found, and what was expected.
        remedy: One sentence: what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["HalveError"], tuple[str, str]]:
        """Pickle by both sentences, so that it survives a process boundary."""
        return type(self), (self.problem, self.remedy)


class HalveWarning(UserWarning):
    """Something that works, but not as well as a user would expect."""


class SourceError(HalveError):
    """A model or text that cannot be found, or a hub that cannot be reached."""


class UnsupportedModelError(HalveError):
    """A model whose blocks or matrices Halve cannot prune."""


class CheckpointError(HalveError):
    """A checkpoint that is damaged, incomplete, or contradicts its config."""


class CalibrationError(HalveError):
    """Calibration or evaluation text that cannot be used as asked."""


class PatternError(HalveError):
    """A sparsity pattern that makes no sense, or does not fit a matrix."""


class QuantizationError(HalveError):
    """A grid of values that does not exist, or that cannot be laid over a matrix."""


class NumericalError(HalveError):
    """Weights, activations or Gram matrices that cannot be computed with."""


class OutputError(HalveError):
    """An output folder that cannot be written, or must not be."""


class TargetMissedError(HalveError):
    """What was written does not have the sparsity or pattern that was promised."""


class DistributedError(HalveError):
    """Processes of one run that cannot work together, or one that has ended."""


class ReportedError(DistributedError):
    """What went wrong in another process of the run, which has said so itself."""
