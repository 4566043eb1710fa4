"""Where a model comes from: a folder, or a repository on the hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from halve.errors import SourceError

# Everything a checkpoint's loading needs, in one weight format.
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
_HUB_FAILURES = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def locate(model: str | Path) -> Path:
    """Return the folder of a model, downloaded first where it is a hub name.

    Args:
        model: A folder, or `owner/name` (or `name`) on the hub.

    Raises:
        SourceError: There is no such folder or repository, or no way to the hub.
    """
    folder = Path(model).expanduser()
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
    return _download(str(model))


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _download(name: str) -> Path:
    try:
        files = HfApi().list_repo_files(name)
        safe = any(file.endswith(".safetensors") for file in files)
        weights = ["*.safetensors"] if safe else ["pytorch_model*.bin"]
        return Path(snapshot_download(name, allow_patterns=_SIDE_FILES + weights))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is neither a folder here nor a model on the hub.",
            "Check the name; for a private model log in with `hf auth login`.",
        ) from error
    except _HUB_FAILURES as error:
        return _cached(name, error)


def _cached(name: str, reason: Exception) -> Path:
    """Return a complete earlier download, for work without a network."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except _HUB_FAILURES as error:
        raise SourceError(
            f"{name} is no folder here, and the hub cannot be reached "
            f"({type(reason).__name__}).",
            "Check the path or the network, or download the model first.",
        ) from error
