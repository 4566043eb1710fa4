"""From options classes to parameters that typer understands.

A command names the classes whose options it takes (`options: PruneOptions`);
`with_options` gives it one parameter for each of their fields. Options that only the
command line has are declared here in the same manner.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from halve.cli.option_sources import OptionSources
from halve.model_path import local_folder
from halve.option import OUTPUT, PANELS, Option, option_of, options_of, with_choices


def check_model(model: str | None) -> str | None:
    """Return a model's name; raise SourceError if it is a path to nothing.

    Called while arguments are parsed, before torch is imported.
    """
    if model is not None:
        local_folder(model)
    return model


def check_found(model: str | None) -> None:
    """Raise SourceError if a model is neither in a folder nor on the Hub.

    Called once the options are checked, before torch is imported.
    """
    if model is None or local_folder(model) is not None:
        return
    from halve.hub import check_on_hub

    check_on_hub(model)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, or a name on the Hub.",
        callback=check_model,
    ),
]
Out = Annotated[
    str,
    Option("Folder to create.", OUTPUT, flags=("--out", "-o"), metavar="OUT"),
]
Json = Annotated[
    bool,
    Option("Print one JSON object and nothing else.", OUTPUT, flags=("--json",)),
]
Keep = Annotated[
    bool,
    Option("Keep the result in MODEL/measurements.json.", OUTPUT),
]
Quiet = Annotated[bool, Option("Show no progress.", OUTPUT, flags=("--quiet", "-q"))]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class CommandOption:
    """One option of a command.

    Attributes:
        name: Name of the parameter, or of the field of its options class.
        type: Its type in Python.
        default: Its default; `Parameter.empty` if it is required.
        option: Its help, unit, choices and heading.
        group: Parameter of the command to whose options class it belongs; "" if it
            belongs to the command alone.
    """

    name: str
    type: Any
    default: Any
    option: Option
    group: str = ""


def with_options(
    *, panels: bool = False, presets: bool = False
) -> Callable[[Callable], Callable[..., None]]:
    """Return a decorator that gives a command one parameter for each option.

    Args:
        panels: Whether `--help` lists the options under their headings.
        presets: Whether the command has `--preset`.
    """

    def decorate(command: Callable) -> Callable[..., None]:
        options = command_options(command)
        arguments = [
            parameter
            for parameter in signature(command).parameters.values()
            if get_origin(parameter.annotation) is Annotated
            and option_of(parameter.annotation) is None
        ]

        sources = list(
            OptionSources(_names_in_files(options), presets).typer_parameters()
        )

        def run(**values: Any) -> None:  # noqa: ANN401
            for source in sources:  # their callbacks have read them
                values.pop(source.name)
            arguments = _gathered(command, options, values)
            # Before the command imports torch, so that mistakes are reported at once.
            for argument in arguments.values():
                if hasattr(argument, "check"):
                    argument.check()
            check_found(arguments.get("model"))
            command(**arguments)

        typed = [_typer_parameter(option, panels) for option in options]
        _set_parameters(run, command, [*arguments, *typed, *sources])
        return run

    return decorate


def command_options(command: Callable) -> list[CommandOption]:
    """Return the options of a command, ordered by heading."""
    options = [
        option
        for parameter in signature(command).parameters.values()
        for option in _options_of_parameter(parameter)
    ]
    order = (*PANELS, "")
    return sorted(options, key=lambda option: order.index(option.option.panel))


def _options_of_parameter(parameter: Parameter) -> Iterator[CommandOption]:
    annotation = parameter.annotation
    if is_dataclass(annotation):
        for field, option in options_of(annotation):
            type_ = get_args(field.type)[0]
            yield CommandOption(
                field.name, type_, field.default, option, parameter.name
            )
    elif (option := option_of(annotation)) is not None:
        type_ = get_args(annotation)[0]
        yield CommandOption(parameter.name, type_, parameter.default, option)


def _set_parameters(
    run: Callable, command: Callable, parameters: list[Parameter]
) -> None:
    """Let typer see the parameters of `run`, and the name and text of `command`."""
    update_wrapper(run, command)
    by_name = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = Signature(by_name)  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {p.name: p.annotation for p in by_name}


def _typer_parameter(declared: CommandOption, panels: bool) -> Parameter:
    """Return an option as a parameter that typer turns into a flag."""
    option, type_, default = declared.option, declared.type, declared.default
    if float in get_args(type_) and str in get_args(type_):
        # Text as well as a number: parsed where it is used.
        type_ = str | None if NoneType in get_args(type_) else str
    if get_origin(type_) is tuple:
        type_, default = list[get_args(type_)[0]], list(default)
    info = typer.Option(
        *option_flags(declared),
        help=with_choices(option),
        parser=parse_bytes if option.unit == "bytes" else None,
        metavar="" if _is_switch(type_) else option.metavar,  # `<bool>` says nothing
        show_default=option.unset or (default is not None and default is not False),
        min=option.minimum,
        max=option.maximum,
        rich_help_panel=option.panel if panels and option.panel else None,
    )
    annotation = Annotated[type_, info]
    return Parameter(
        declared.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _is_switch(type_: Any) -> bool:  # noqa: ANN401
    return type_ is bool or bool in get_args(type_)


def option_flags(declared: CommandOption) -> tuple[str, ...]:
    """Return the names of an option on the command line.

    A switch has a negative form only if its option names one.
    """
    return declared.option.flags or (f"--{declared.name.replace('_', '-')}",)


def _names_in_files(options: list[CommandOption]) -> dict[str, str]:
    """Return the names that an option has in a file -> name of its parameter."""
    flags = {
        flag.partition("/")[0].removeprefix("--").replace("-", "_"): option.name
        for option in options
        for flag in option_flags(option)
        if flag.startswith("--")
    }
    return flags | {option.name: option.name for option in options}


def _gathered(
    command: Callable, options: list[CommandOption], values: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a command, its options classes filled in."""
    arguments = dict(values)
    fields: dict[str, dict[str, Any]] = {}
    for option in options:
        if option.group:
            value = arguments.pop(option.name)
            value = tuple(value) if isinstance(value, list) else value
            fields.setdefault(option.group, {})[option.name] = value
    classes = {name: p.annotation for name, p in signature(command).parameters.items()}
    built = {name: classes[name](**values) for name, values in fields.items()}
    return arguments | built


def parse_bytes(text: str) -> int:
    """Parse a number of bytes: `8GiB`, `500MB` (binary as well) or `1000000`."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    try:
        if match:
            return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is not a size; write it as 8GiB or 500MiB")
