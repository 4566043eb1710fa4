"""A model's name as a path: a folder, or what was probably meant. No torch here."""

from difflib import get_close_matches
from pathlib import Path

from halve.errors import SourceError

# Entries of a folder among which a misspelt name is looked for.
_MAX_ENTRIES = 1000


def local_folder(model: str | Path) -> Path | None:
    """Return the folder that a model's name stands for; None if it may be on the Hub.

    Raises:
        SourceError: It is a file, or a path at which there is nothing.
    """
    folder = _path_of(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SourceError(
            f"{folder} is a file; a model is a folder with a config.json.",
            "Pass the folder that contains the file.",
        )
    if _looks_like_a_path(str(model)):
        raise SourceError(
            f"The folder {folder} does not exist.",
            suggestion(model) or "Check the path of the model.",
        )
    return None


def suggestion(model: str | Path) -> str:
    """Return a sentence that names the folder whose name is nearest; "" if none is."""
    path = Path(model).expanduser()
    try:
        entries = zip(range(_MAX_ENTRIES), path.parent.iterdir(), strict=False)
        models = {e.name for _, e in entries if (e / "config.json").is_file()}
    except OSError:
        return ""
    found = get_close_matches(path.name, models, n=1)
    return (
        f"Did you mean the folder {_shown(path.with_name(found[0]))}?" if found else ""
    )


def _shown(path: Path) -> str:
    """Return a path that cannot be taken for a name on the Hub."""
    return str(path) if path.is_absolute() else f"./{path}"


def _path_of(model: str | Path) -> Path:
    try:
        folder = Path(model).expanduser()
        folder.exists()
    except TypeError as error:
        raise SourceError(
            f"The model is a {type(model).__name__}, where a folder or a name on the "
            "Hub was expected.",
            "Save the model with save_pretrained, and pass its folder.",
        ) from error
    # Name too long, unknown ~user, or a null byte.
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{str(model)[:200]!r} is not a valid path.", "Check the path of the model."
        ) from error
    return folder


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
