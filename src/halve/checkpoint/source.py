"""Find a model: a local folder, or a repository on the Hugging Face Hub."""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from halve.checkpoint.index import select_weight_files
from halve.checkpoint.side_files import select_side_files
from halve.errors import HalveError
from halve.hub import cached_copy, list_files
from halve.model_path import local_folder


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
    def download(file: str) -> Path:
        return Path(hf_hub_download(name, file))

    try:
        # Before anything is downloaded: without a network the user learns at once.
        wanted = files_to_download(list_files(name), download, weights)
        patterns = [glob.escape(file) for file in wanted]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HalveError:
        raise
    # Which errors the Hub's network library raises depends on its version.
    except Exception as error:  # noqa: BLE001
        return cached_copy(name, error)


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
