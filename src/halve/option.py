"""What is said once about an option: its help, unit, choices and heading.

`halve.options` annotates the fields of its classes with `Option`. Importing this module
loads neither torch nor typer.
"""

from dataclasses import Field, dataclass, fields
from textwrap import fill
from typing import Any, TypeVar, get_args

from halve.errors import HalveError

# Headings of `--help` and of the reference page, in their order.
PANELS = (
    TARGET := "Target",
    TEXT := "Text",
    MODEL := "Random model",
    MEASUREMENT := "Measurement",
    SAMPLING := "Sampling",
    SOLVER := "Solver",
    CALIBRATION := "Calibration",
    FEW_BITS := "Few bits",
    RESOURCES := "Resources",
    OUTPUT := "Output",
)


@dataclass(frozen=True)
class Option:
    """What a user reads about one option.

    Attributes:
        help: What it does, in one sentence.
        panel: Heading under which `--help` lists it.
        choices: Values that it accepts, where they are a closed set.
        unit: Unit of its value. The command line accepts `bytes` as a size (`8GiB`).
        unset: What the default, None, stands for.
        minimum: Smallest value that it accepts.
        maximum: Largest value that it accepts.
        flags: Its names on the command line, where they differ from the field's name.
        metavar: Placeholder for its value in `--help`.
        details: Further sentences, for the reference page and docstrings only.
    """

    help: str
    panel: str = ""
    choices: tuple[str, ...] = ()
    unit: str = ""
    unset: str = ""
    minimum: int | None = None
    maximum: int | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    details: str = ""


def option_of(annotation: Any) -> Option | None:  # noqa: ANN401
    """Return the `Option` in an annotation; None where it has none."""
    return next(
        (part for part in get_args(annotation) if isinstance(part, Option)), None
    )


def options_of(options: Any) -> list[tuple[Field, Option]]:  # noqa: ANN401
    """Return the fields of an options class, or instance, that a user may set."""
    pairs = [(field, option_of(field.type)) for field in fields(options)]
    return [(field, option) for field, option in pairs if option is not None]


def describe_options(*classes: type) -> str:
    """Return the `Attributes` or `Args` lines for all options of some classes."""
    paragraphs = [
        fill(
            f"{field.name}: {full_text(option)}",
            width=80,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for options in classes
        for field, option in options_of(options)
    ]
    return "\n".join(paragraphs)


def full_text(option: Option) -> str:
    """Return an option's help, choices, unit, default and details, in sentences."""
    unit = f"In {option.unit}." if option.unit else ""
    unset = f"Default: {option.unset}." if option.unset else ""
    sentences = [with_choices(option), unit, unset, option.details]
    return " ".join(sentence for sentence in sentences if sentence)


def with_choices(option: Option) -> str:
    """Return an option's help, followed by its choices if it has any."""
    choices = f" One of {', '.join(option.choices)}." if option.choices else ""
    return option.help + choices


_Class = TypeVar("_Class", bound=type)


def documented(options: _Class) -> _Class:
    """Append the help of every option to the docstring of an options class."""
    options.__doc__ = f"{options.__doc__}\n\nAttributes:\n{describe_options(options)}\n"
    return options


def check_ranges(options: Any) -> None:  # noqa: ANN401
    """Raise HalveError on the first number outside the range of its option."""
    for field, option in options_of(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            _check_range(field.name, option, number)


def _check_range(name: str, option: Option, value: Any) -> None:  # noqa: ANN401
    if option.minimum is not None and value is not None and value < option.minimum:
        raise HalveError(
            f"{name} is {value}, which is too small.",
            f"Set {name} to {option.minimum} or more ({_flag(name, option)}).",
        )
    if option.maximum is not None and value is not None and value > option.maximum:
        raise HalveError(
            f"{name} is {value}, which is too large.",
            f"Set {name} to {option.maximum} or less ({_flag(name, option)}).",
        )


def _flag(name: str, option: Option) -> str:
    return option.flags[0] if option.flags else f"--{name.replace('_', '-')}"
