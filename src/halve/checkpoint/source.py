"""Find a model: a local folder, or a repository on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.errors import SourceError
from halve.model_path import local_folder, suggestion

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
    folder = local_folder(model)
    return _download(str(model), weights) if folder is None else folder


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
            suggestion(name)
            or "Check the name; for a private model log in with `hf auth login`.",
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
            suggestion(name)
            or "Check the path or the network, or download the model first.",
        ) from error
