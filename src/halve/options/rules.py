"""Rules: another sparsity for the matrices whose names match a regular expression."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from halve.errors import HalveError
from halve.sparsity_text import parse_sparsity


@dataclass(frozen=True)
class Rules:
    """Which matrices have another sparsity, and which are left as they are.

    A regular expression matches a matrix if it is found anywhere in the name of its
    tensor, such as `model.layers.3.mlp.down_proj.weight`.

    Attributes:
        sparsities: Regular expressions and sparsities; the last that matches counts.
        skipped: Regular expressions of matrices that are left as they are, whatever
            the rules say.
    """

    sparsities: tuple[tuple[re.Pattern[str], str], ...]
    skipped: tuple[re.Pattern[str], ...]

    def __bool__(self) -> bool:
        return bool(self.sparsities or self.skipped)

    def skips(self, tensor: str) -> bool:
        """Whether a matrix is left as it is."""
        return any(regex.search(tensor) for regex in self.skipped)

    def speak_of(self, tensor: str) -> bool:
        """Whether a matrix is left as it is, or a rule asks for its sparsity."""
        return self.skips(tensor) or self.sparsity(tensor) is not None

    def sparsity(self, tensor: str) -> str | None:
        """Return the sparsity that a rule asks for; None where none matches."""
        found = [text for regex, text in self.sparsities if regex.search(tensor)]
        return found[-1] if found else None

    def check_matches(self, tensors: Iterable[str]) -> None:
        """Check that every expression matches a matrix, and that some are pruned.

        Args:
            tensors: Names of all prunable matrices.

        Raises:
            HalveError: One does not hold.
        """
        names = list(tensors)
        for regex in (*(regex for regex, _ in self.sparsities), *self.skipped):
            if not any(regex.search(name) for name in names):
                raise HalveError(
                    f"The rule {regex.pattern!r} matches no matrix of the model.",
                    f"Write a part of a name such as {names[0]} (--rule, --skip).",
                )
        if all(self.skips(name) for name in names):
            raise HalveError(
                "skip matches every matrix of the model, so nothing would be pruned.",
                "Skip fewer of them (--skip).",
            )


def parse_rules(rules: Iterable[str], skip: Iterable[str], allow_dense: bool) -> Rules:
    """Parse rules as options have them.

    Args:
        rules: `REGEX=SPARSITY` each, such as `down_proj=70%`.
        skip: Regular expressions.
        allow_dense: Whether a sparsity of 0 is accepted, because weights are quantized.

    Raises:
        HalveError: A rule has no sparsity, or an expression is not valid.
        PatternError: A sparsity is not valid.
    """
    parsed: list[tuple[re.Pattern[str], str]] = []
    for rule in rules:
        regex, separator, sparsity = rule.rpartition("=")
        if not separator or not regex:
            raise HalveError(
                f"{rule!r} is not a rule: a regular expression, =, and a sparsity were "
                "expected.",
                "Write it as 'down_proj=70%' (--rule).",
            )
        parse_sparsity(sparsity, allow_dense)
        parsed.append((_compiled(regex), sparsity))
    return Rules(tuple(parsed), tuple(_compiled(regex) for regex in skip))


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise HalveError(
            f"{regex!r} is not a regular expression: {error}.",
            "Write it as Python's re module does (--rule, --skip).",
        ) from error
