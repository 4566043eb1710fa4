"""Find a model: a local folder, or a repository on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.errors import SourceError

# Everything that loading a checkpoint needs, except the weights.
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
# Seconds until the Hub's first answer.
_TIMEOUT = 20


def resolve_model(model: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model; a Hub repository is downloaded first.

    Args:
        model: A folder, or the name of a Hub repository: `owner/name` or `name`.
        weights: Whether to download the weights; all other files always are.

    Raises:
        SourceError: There is no such folder or repository, or the Hub cannot be reached
            and its cache holds no complete copy.
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
            f"The folder {folder} does not exist.", "Check the path of the model."
        )
    return _download(str(model), weights)


def _path_of(model: str | Path) -> Path:
    try:
        folder = Path(model).expanduser()
        folder.exists()
    except (OSError, RuntimeError) as error:  # name too long, or unknown ~user
        raise SourceError(
            f"{str(model)[:200]!r} is not a valid path.", "Check the path of the model."
        ) from error
    return folder


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _download(name: str, weights: bool) -> Path:
    try:
        # A single request without retries: without a network the user learns at once.
        files = HfApi().model_info(name, timeout=_TIMEOUT).siblings or ()
        has_safetensors = any(f.rfilename.endswith(".safetensors") for f in files)
        large = ["*.safetensors"] if has_safetensors else ["pytorch_model*.bin"]
        patterns = _SIDE_FILES + large * weights
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is neither a local folder nor a model on the Hub.",
            "Check the name; for a private model log in with `hf auth login`.",
        ) from error
    # Which errors the Hub's network library raises depends on its version.
    except Exception as error:  # noqa: BLE001
        return _cached(name, error)


def _cached(name: str, reason: Exception) -> Path:
    """Return an earlier complete download, to work without a network."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        summary = " ".join(str(reason).split())[:120].rstrip(". ")
        raise SourceError(
            f"{name} is not a local folder, and it could not be downloaded from the "
            f"Hub ({type(reason).__name__}: {summary}).",
            "Check the path or the network, or download the model first.",
        ) from error
