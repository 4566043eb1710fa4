"""Where options come from beside the command line: a file, and presets.

What is given on the command line counts first, then the file, then the preset.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from halve.errors import HalveError
from halve.options import PRESETS, preset_options

_FILE, _PRESET = "halve.file", "halve.preset"


@dataclass(frozen=True)
class OptionSources:
    """Reads the options of one command from a file or a preset.

    Attributes:
        parameters: Name as in a file, such as `seq_len` -> name of the parameter.
        has_presets: Whether the command has presets.
    """

    parameters: Mapping[str, str]
    has_presets: bool

    def typer_parameters(self) -> Iterable[Parameter]:
        """Yield `--config`, and `--preset` if the command has presets."""
        yield _parameter(
            "config",
            self.read_file,
            "YAML file of options, such as `sparsity: 60%`; the command line overrides "
            "it.",
            "FILE",
        )
        if self.has_presets:
            yield _parameter(
                "preset",
                self.take_preset,
                f"Options under one name, which others override: {', '.join(PRESETS)}.",
                "NAME",
            )

    def read_file(self, context: typer.Context, path: str | None) -> None:
        """Let a file's options be defaults of the command.

        Raises:
            HalveError: It cannot be read, or names an option that there is not.
        """
        if path is None:
            return
        found = {self._parameter(path, k): v for k, v in _read(path).items()}
        if self.has_presets and (preset := found.pop("preset", None)) is not None:
            context.meta.setdefault(_PRESET, preset_options(str(preset)))
        context.meta[_FILE] = found
        _set_defaults(context)

    def take_preset(self, context: typer.Context, name: str | None) -> None:
        """Let a preset's options be defaults of the command."""
        if name is not None:
            context.meta[_PRESET] = preset_options(name)
            _set_defaults(context)

    def _parameter(self, path: str, key: object) -> str:
        name = str(key).removeprefix("--").replace("-", "_")
        if name == "preset" and self.has_presets:
            return name
        if name not in self.parameters:
            close = get_close_matches(name, self.parameters, n=1)
            raise HalveError(
                f"{path} names an option {str(key)[:80]!r}, which the command does "
                "not have.",
                f"Did you mean {close[0]}?" if close else "See the command's --help.",
            )
        return self.parameters[name]


def _set_defaults(context: typer.Context) -> None:
    meta = context.meta
    context.default_map = {**meta.get(_PRESET, {}), **meta.get(_FILE, {})}


def _read(path: str) -> dict[Any, Any]:
    import yaml

    try:
        contents = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HalveError(
            f"{path} cannot be read as YAML ({reason}).",
            "Write an option and its value a line, such as `sparsity: 60%` (--config).",
        ) from error
    if not isinstance(contents, dict):
        raise HalveError(
            f"{path} holds no options.",
            "Write an option and its value a line, such as `sparsity: 60%` (--config).",
        )
    return contents


def _parameter(name: str, callback: Any, text: str, metavar: str) -> Parameter:  # noqa: ANN401
    """Return an option that is handled before others."""
    info = typer.Option(
        f"--{name}",
        callback=callback,
        is_eager=True,
        help=text,
        metavar=metavar,
    )
    annotation = Annotated[str | None, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
