"""What `halve verify` reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A problem with a file or a matrix.

    Attributes:
        name: Name of the file, or of the matrix's tensor.
        problem: What is wrong with it, as a clause without a subject's name.
    """

    name: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """An output compared with its record.

    Attributes:
        folder: The output.
        files: Number of files whose SHA-256 was compared.
        bytes: Total size of these files.
        matrices: Number of matrices whose shape, sparsity, pattern and grid were
            checked: all of them, or 0 where a file is damaged.
        findings: What is wrong; empty where nothing is.
    """

    folder: str
    files: int
    bytes: int
    matrices: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether there are no findings."""
        return not self.findings
