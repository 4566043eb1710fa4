"""What is said once about an option: its help, unit, choices and heading.

`halve.options` annotates the fields of its classes with `Option`. Importing this module
loads neither torch nor typer.
"""

import operator
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from numbers import Real
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin

from halve.errors import HalveError

# Headings of `--help` and of the reference page, in their order.
PANELS = (
    TARGET := "Target",
    TEXT := "Text",
    MODEL := "Random model",
    TASKS := "Tasks",
    MEASUREMENT := "Measurement",
    SAMPLING := "Sampling",
    SOLVER := "Solver",
    CALIBRATION := "Calibration",
    TRAINING := "Training",
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


class Options:
    """Base of the options classes: every value has the type that its field declares.

    Python callers pass paths, NumPy numbers and torch devices. They are converted; a
    value that stands for none of the declared type is refused, before a run could fail
    on it hours later.
    """

    def __post_init__(self) -> None:
        """Convert every value, or raise HalveError."""
        for field in fields(cast("Any", self)):
            option = option_of(field.type)
            value = getattr(self, field.name)
            if option is not None:
                value = _converted(field, option, value)
            elif not callable(value):
                raise HalveError(
                    f"{field.name} is a {type(value).__name__}, which cannot be "
                    "called.",
                    f"Set {field.name} to a function, or leave it out.",
                )
            object.__setattr__(self, field.name, value)


def _converted(field: Field, option: Option, value: Any) -> Any:  # noqa: ANN401
    """Return a value of the type that a field declares.

    Raises:
        HalveError: It stands for none.
    """
    declared = get_args(field.type)[0]
    kinds = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    if value is None and NoneType in kinds:
        return value
    for kind in (kind for kind in kinds if kind is not NoneType):
        with suppress(TypeError):
            return (
                _as_tuple(kind, value)
                if get_origin(kind) is tuple
                else _KINDS[kind](value)
            )
    expected = " or ".join(_NAMES.get(kind, "numbers") for kind in kinds)
    raise HalveError(
        f"{field.name} is {str(value)[:80]!r} of type {type(value).__name__}, where "
        f"{expected} was expected.",
        f"Set {field.name} to such a value ({_flag(field.name, option)}).",
    )


def _as_tuple(kind: Any, value: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Return the elements of a value as those of `tuple[element, ...]`."""
    if isinstance(value, str):
        raise TypeError(value)
    element = _KINDS[get_args(kind)[0]]
    return tuple(element(each) for each in value)


def _as_text(value: Any) -> str:  # noqa: ANN401
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.device):
        return str(value)
    return os.fsdecode(value)


def _as_integer(value: Any) -> int:  # noqa: ANN401
    if isinstance(value, bool):
        raise TypeError(value)
    return operator.index(value)


def _as_number(value: Any) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(value)
    return float(value)


def _as_truth(value: Any) -> bool:  # noqa: ANN401
    # NumPy's type is no subclass of Python's.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
        return bool(value)
    raise TypeError(value)


_KINDS: dict[type, Callable[[Any], Any]] = {
    str: _as_text,
    int: _as_integer,
    float: _as_number,
    bool: _as_truth,
}
_NAMES = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    NoneType: "None",
}


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


def check_choice(options: Any, name: str) -> None:  # noqa: ANN401
    """Raise HalveError if a field's value is none of its option's choices."""
    [option] = [option for field, option in options_of(options) if field.name == name]
    value = getattr(options, name)
    if value not in option.choices:
        raise HalveError(
            f"There is no {name} {value!r}.",
            f"Set {name} to one of {', '.join(option.choices)} "
            f"({_flag(name, option)}).",
        )


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
