"""What a refusal looks like from outside, checked the same way everywhere."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers

from halve.cli import main


def snapshot(folder: Path) -> dict[str, str]:
    """Return path -> digest (or what else is there) of all that lies in a folder."""
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
    """Nobody answers questions here."""

    def __getattr__(self, name: str):
        raise AssertionError("standard input was touched")


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch):
    """Do what the environment set by `main` does in a process of its own."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture
def refused(capfd, monkeypatch, tmp_path) -> Callable[..., str]:
    """Return a function that runs a command and checks that it is refused properly.

    Nothing that lay in `tmp_path` may change. What is new there must lie in a folder
    `.partial`, and be allowed by `started`.
    """

    def run(
        *words: object, mentions: tuple[str, ...] = (), started: bool = False
    ) -> str:
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, words)])
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
    """One paragraph of two plain sentences that says what it should."""
    assert errors.startswith("Error: "), errors
    assert errors.endswith(".\n"), errors
    assert errors.count("\n") == 1, errors
    assert errors[:-1].isprintable(), errors
    assert ". " in errors[:-2], errors
    assert len(errors) < 1000, errors
    for words in mentions:
        assert words in errors, (words, errors)
