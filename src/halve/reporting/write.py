"""Write the page, and the card, of an output."""

import os
from contextlib import suppress
from pathlib import Path

from halve.errors import OutputError
from halve.reporting.card import CARD_MARK, render_card, render_eval_results
from halve.reporting.facts import Facts
from halve.reporting.page import render

PAGE = "report.html"
CARD = "README.md"


def write_report(
    folder: Path, facts: Facts, file: str | None = None, card: bool = False
) -> Path:
    """Write the page about an output, and its card if that is wanted.

    Args:
        folder: The output.
        facts: What is known of it.
        file: File of the page; by default `report.html` in the folder.
        card: Whether to write `README.md` into the folder, and `.eval_results` for
            tasks whose data set is on the Hub.

    Returns:
        The path of the page.

    Raises:
        OutputError: A file cannot be written, or the folder has a card that Halve has
            not made.
    """
    page = folder / PAGE if file is None else Path(file).expanduser()
    if card:
        _check_card(folder / CARD)
    _replace(page, render(facts))
    if card:
        _replace(folder / CARD, render_card(facts))
        for name, text in render_eval_results(facts).items():
            _replace(folder / name, text)
    return page


def _check_card(path: Path) -> None:
    """Raise OutputError if there is a card that Halve has not made."""
    try:
        is_ours = not path.exists() or CARD_MARK in path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        is_ours = False
    if not is_ours:
        raise OutputError(
            f"{path} exists and was not made by `halve report`.",
            "Move it away, or leave out card (--card).",
        )


def _replace(path: Path, text: str) -> None:
    """Write a file, completely or not at all.

    `checkpoint.files` does the same, but imports torch, which a report does not need.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} could not be written: {error}.",
            "Fix the cause and run the same command again.",
        ) from error
