"""A text's name: a file, or a data set and its parts. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from halve.errors import SourceError
from halve.untrusted import truncated

# How names of text files end.
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class DataSetName:
    """What to read: `PLACE:CONFIG:SPLIT:COLUMN`, of which all but the place may miss.

    Attributes:
        place: Name on the Hub, folder or file.
        config: Name of a configuration; empty for the only one.
        split: Name of a split; empty for `train`, or `test` where text is evaluated.
        column: Name of a column; empty for the first that Halve knows.
    """

    place: str
    config: str = ""
    split: str = ""
    column: str = ""

    @classmethod
    def parse(cls, name: str) -> "DataSetName":
        """Parse a name; one of an existing file or folder may contain colons.

        Raises:
            SourceError: It has more than four parts.
        """
        if Path(name).expanduser().exists():
            return cls(name)
        place, *parts = name.split(":")
        if len(parts) > 3:  # noqa: PLR2004  (configuration, split, column)
            raise SourceError(
                f"{truncated(name)} has too many parts.",
                "Write it as DATA:CONFIG:SPLIT:COLUMN; parts may be empty.",
            )
        return cls(place, *parts)


def parse_text_name(name: str) -> tuple[DataSetName, Path, bool]:
    """Return the parts of a name, the path that it may be, and whether it is a file.

    Raises:
        SourceError: It is the name of nothing, or of a file that is not there.
    """
    try:
        parsed = DataSetName.parse(name)
        path = Path(parsed.place).expanduser()
        is_file = path.suffix in SUFFIXES or (path.exists() and not path.is_dir())
    # The name is too long, ~user unknown, or it holds a null byte.
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{name[:200]!r} is not the name of a text.", "Use a file or a data set."
        ) from error
    if is_file and not path.is_file():
        raise SourceError(f"There is no file {path}.", "Check the path of the text.")
    return parsed, path, is_file
