"""Find a model: a local folder, or a repository on the Hugging Face Hub."""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.checkpoint.index import select_weight_files
from halve.checkpoint.side_files import select_side_files
from halve.errors import HalveError, SourceError
from halve.model_path import local_folder, suggestion

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
        found = HfApi().model_info(name, timeout=_TIMEOUT)
        files = [file.rfilename for file in found.siblings or ()]

        def download(file: str) -> Path:
            return Path(hf_hub_download(name, file))

        wanted = files_to_download(files, download, weights)
        patterns = [glob.escape(file) for file in wanted]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HalveError:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is neither a local folder nor a model on the Hub.",
            suggestion(name)
            or "Check the name; for a private model log in with `hf auth login`.",
        ) from error
    # Which errors the Hub's network library raises depends on its version.
    except Exception as error:  # noqa: BLE001
        return _cached(name, error)


def files_to_download(
    names: Sequence[str], download: Callable[[str], Path], weights: bool = True
) -> list[str]:
    """Return the files of a repository that a local folder needs to hold.

    Args:
        names: All files of the repository.
        download: Downloads one of them, and returns its path.
        weights: Whether the weights are wanted.
    """
    large = select_weight_files(names, download) if weights else []
    return [*select_side_files(names), *large]


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
