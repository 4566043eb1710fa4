"""Find a model: a local folder, or a repository on the Hugging Face Hub."""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.checkpoint.index import select_weight_files
from halve.checkpoint.side_files import select_side_files
from halve.errors import HalveError, SourceError

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
            "Check the name; for a private model log in with `hf auth login`.",
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
            "Check the path or the network, or download the model first.",
        ) from error
