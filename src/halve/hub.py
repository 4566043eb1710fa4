"""Ask the Hugging Face Hub whether it has a model. No torch here."""

from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from halve.errors import HalveError, SourceError
from halve.model_path import suggestion

# Seconds until the Hub's first answer.
_TIMEOUT = 20


def check_on_hub(name: str) -> None:
    """Raise SourceError unless the Hub or its cache has a model; download nothing."""
    try:
        if not _is_cached(name):
            list_files(name)
    except HalveError:
        raise
    except Exception as error:  # noqa: BLE001  (as in `checkpoint.source`)
        cached_copy(name, error)


def _is_cached(name: str) -> bool:
    with suppress(HFValidationError):
        return try_to_load_from_cache(name, "config.json") is not None
    return False


@cache
def list_files(name: str) -> tuple[str, ...]:
    """Return the files of a repository: a single request a process, without retries.

    Raises:
        SourceError: There is no such repository.
        Exception: The Hub cannot be reached; of any class.
    """
    try:
        found = HfApi().model_info(name, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{name} is neither a local folder nor a model on the Hub.",
            suggestion(name)
            or "Check the name; for a private model log in with `hf auth login`.",
        ) from error
    return tuple(file.rfilename for file in found.siblings or ())


def cached_copy(name: str, reason: Exception) -> Path:
    """Return an earlier complete download, to work without a network.

    Args:
        name: Name of the repository.
        reason: Why it cannot be downloaded now, for the error.

    Raises:
        SourceError: There is none.
    """
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
