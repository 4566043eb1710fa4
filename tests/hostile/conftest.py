"""Run a command that must be refused, and check the refusal from outside."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers

from halve.cli import main


def snapshot(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 (of a link, its target) of everything in a folder."""
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
    }


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder"


class _NoTerminal:
    """A standard input that must not be used."""

    def __getattr__(self, name: str):
        raise AssertionError("standard input was used")


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch):
    """Do what the environment variables that `main` sets do in a new process."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def refused(capfd, monkeypatch, tmp_path) -> Callable[..., str]:
    """Return a function that runs a command and checks that it is refused.

    The command must exit with 1 and print one error line that contains each of
    `mentions`. No file in `tmp_path` may change. New ones must lie in a `.partial`
    folder, and are allowed only with `started`.
    """

    def run(
        *arguments: object, mentions: tuple[str, ...] = (), started: bool = False
    ) -> str:
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", _NoTerminal())
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        output, errors = capfd.readouterr()
        after = snapshot(tmp_path)
        assert exit_.value.code == 1
        assert output == ""
        _check_message(errors, mentions)
        assert {path: after.get(path) for path in before} == before
        new = sorted(after.keys() - before.keys())
        assert all(started and ".partial" in path for path in new), new
        return errors

    return run


def _check_message(errors: str, mentions: tuple[str, ...]) -> None:
    """Check for one printable line of two sentences or more, with all mentions."""
    assert errors.startswith("Error: "), errors
    assert errors.endswith(".\n"), errors
    assert errors.count("\n") == 1, errors
    assert errors[:-1].isprintable(), errors
    assert ". " in errors[:-2], errors
    assert len(errors) < 1000, errors
    for mention in mentions:
        assert mention in errors, (mention, errors)
