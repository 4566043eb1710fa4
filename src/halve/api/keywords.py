"""How the functions take options: as an object, as keywords, or as both."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from halve.option import describe_options
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

_Function = TypeVar("_Function", bound=Callable)
_Options = TypeVar(
    "_Options",
    PruneOptions,
    RunOptions,
    EvalOptions,
    BenchOptions,
    GenerateOptions,
    RecoverOptions,
    ReportOptions,
    TaskOptions,
)


def takes(*classes: type) -> Callable[[_Function], _Function]:
    """Return a decorator that shows the fields of options classes in `help()`.

    The signature gets one keyword for each field, with its default, in the place of
    `**keywords`; the docstring gets the help of each.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        positional = [p for p in signature.parameters.values() if p.name != "keywords"]
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for options in classes
            for field in fields(options)
        ]
        shown = signature.replace(parameters=[*positional, *keywords])
        documentation = inspect.getdoc(function)
        described = f"{documentation}\n\nKeywords:\n{describe_options(*classes)}\n"
        function.__doc__ = described
        cast("Any", function).__signature__ = shown
        return function

    return decorate


def with_keywords(options: _Options, keywords: Any) -> _Options:  # noqa: ANN401
    """Return options with the fields replaced that keywords name.

    Raises:
        TypeError: There is no such keyword.
    """
    return replace(options, **keywords)
