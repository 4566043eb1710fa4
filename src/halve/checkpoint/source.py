"""Where a model comes from: a folder, or a repository on the hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.errors import SourceError

# Everything a checkpoint's loading needs, in one weight format.
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
# Seconds for the hub's first answer.
_PATIENCE = 20


def locate(model: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model, downloaded first where it is a hub name.

    Args:
        model: A folder, or `owner/name` (or `name`) on the hub.
        weights: Whether they are downloaded; the rest always is.

    Raises:
        SourceError: There is no such folder or repository, or no way to the hub.
    """
    folder = _path_of(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SourceError(
            f"{folder} is a file; a model is a folder with a config.json.",
            "Name the folder that holds the file.",
        )
    if _looks_like_a_path(str(model)):
        raise SourceError(
            f"There is no folder {folder}.", "Check the path of the model."
        )
    return _download(str(model), weights)


def _path_of(model: str | Path) -> Path:
    try:
        folder = Path(model).expanduser()
        folder.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or an unknown ~user
        raise SourceError(
            f"{str(model)[:200]!r} cannot be looked up.", "Check the path of the model."
        ) from error
    return folder


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _download(name: str, weights: bool) -> Path:
    try:
        # One request, not repeated: without a network the user knows at once.
        found = HfApi().model_info(name, timeout=_PATIENCE).siblings or ()
        safe = any(file.rfilename.endswith(".safetensors") for file in found)
        large = ["*.safetensors"] if safe else ["pytorch_model*.bin"]
        wanted = _SIDE_FILES + large * weights
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is neither a folder here nor a model on the hub.",
            "Check the name; for a private model log in with `hf auth login`.",
        ) from error
    # The hub's network library has errors of its own, by version.
    except Exception as error:  # noqa: BLE001
        return _cached(name, error)


def _cached(name: str, reason: Exception) -> Path:
    """Return a complete earlier download, for work without a network."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        words = " ".join(str(reason).split())[:120].rstrip(". ")
        raise SourceError(
            f"{name} is no folder here, and it could not be had from the hub "
            f"({type(reason).__name__}: {words}).",
            "Check the path or the network, or download the model first.",
        ) from error
