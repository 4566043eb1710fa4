"""From a row of a data set to a document: which column, and what its value says.

A column is found by its name and never by its place. A text is taken as it is; a
conversation is rendered by the model's chat template; a null or an empty conversation
holds no text, and its row is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from halve.errors import CalibrationError
from halve.untrusted import truncated

Messages = list[dict[str, Any]]
# From the messages of a conversation to its text.
Render = Callable[[Messages], str]

# Columns that are read where none is named, the preferred one first.
_COLUMNS = ("text", "messages", "conversations")
# How ShareGPT calls roles, in its `from`.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def read_documents(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    column: str | None,
    render: Render | None,
) -> Iterator[str]:
    """Yield the text of each row that has one.

    Args:
        rows: Where a row is, for messages (`line 3 of a.jsonl`), and its columns.
        column: The column to read; None for the first of `text`, `messages` and
            `conversations` that the first row has.
        render: Renders conversations; None to refuse them.

    Raises:
        CalibrationError: A row lacks the column, or its value is neither a text nor a
            conversation, or one that the chat template refuses.
    """
    for place, row in rows:
        column = choose_column(row, column, place)
        document = _document(row[column], column, place, render)
        if document is not None:
            yield document


def choose_column(columns: Iterable[str], column: str | None, place: str) -> str:
    """Return the column to read.

    Args:
        columns: Those that there are.
        column: The one that was asked for; None for any that Halve knows.
        place: Where they are, for the message.

    Raises:
        CalibrationError: It is not there; or none that Halve knows is.
    """
    found = list(columns)
    candidates = _COLUMNS if column is None else (column,)
    chosen = next((name for name in candidates if name in found), None)
    if chosen is not None:
        return chosen
    wanted = " or ".join(f"`{name}`" for name in candidates)
    raise CalibrationError(
        f"There is no column {wanted} in {place}, but "
        f"{truncated(', '.join(f'`{name}`' for name in found)) or 'none at all'}.",
        "Name the column that holds the text: DATA:CONFIG:SPLIT:COLUMN (parts may be "
        "empty), or FILE:COLUMN.",
    )


def _document(
    value: object, column: str, place: str, render: Render | None
) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return valid_text(value)
    messages = as_messages(value)
    if messages is None:
        raise CalibrationError(
            f"`{truncated(column)}` of {place} is a {type(value).__name__}, neither a "
            "text nor a conversation.",
            "Name a column of texts, or of messages that have a role and a content.",
        )
    return _rendered(messages, column, place, render) if messages else None


def _rendered(
    messages: Messages, column: str, place: str, render: Render | None
) -> str:
    if render is None:
        raise CalibrationError(
            f"`{truncated(column)}` of {place} is a conversation, which only a chat "
            "template turns into text.",
            "Name a column of texts: DATA:CONFIG:SPLIT:COLUMN.",
        )
    try:
        return valid_text(render(messages))
    except CalibrationError as error:
        problem = f"`{truncated(column)}` of {place}: {error.problem}"
        raise CalibrationError(problem, error.remedy) from error


def valid_text(text: str) -> str:
    """Return a text, with `?` for lone surrogates, which tokenizers do not accept."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def as_messages(value: object) -> Messages | None:
    """Return the messages of a conversation, each with its role and its content.

    Args:
        value: A list of objects with `role` and `content`, or with `from` and `value`
            as in ShareGPT; or an object of such lists, as `datasets` returns some.

    Returns:
        The messages, nulls left out; None if it is no conversation.
    """
    rows = _transposed(value) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        return None
    messages = [_message(row) for row in rows]
    return None if None in messages else [m for m in messages if m is not None]


def _transposed(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return a list of objects for an object of lists that are equally long."""
    lists = [values for values in columns.values() if isinstance(values, list)]
    if len(lists) != len(columns) or len({len(values) for values in lists}) != 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _message(row: object) -> dict[str, Any] | None:
    if not isinstance(row, dict):
        return None
    if "role" in row:
        return {key: value for key, value in row.items() if value is not None}
    if isinstance(sender := row.get("from"), str) and "value" in row:
        return {"role": _ROLES.get(sender, sender), "content": row["value"] or ""}
    return None
