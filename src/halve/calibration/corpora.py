"""Load text by name, for calibration or for evaluation.

`c4`, `wikitext2` and `ptb` are loaded and cut as in the SparseGPT paper; any other name
is a data set on the Hub; a path is a local .txt, .jsonl or .parquet file, or a folder
with a data set; `stdlib` is the source code of the running Python's standard library,
which needs no network.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halve.calibration.data_sets import column_of_file, loading_error, read_data_set
from halve.calibration.documents import Render
from halve.calibration.text_files import read_file, text_nbytes
from halve.errors import CalibrationError
from halve.text_name import DataSetName, parse_text_name

Part = Literal["calibration", "evaluation"]

# Characters of a part of a text. Each part takes one, two or four bytes a character: an
# emoji somewhere does not widen the whole.
_PART = 2**18


@dataclass(frozen=True)
class Corpus:
    """Documents, and how to join them into one text.

    Attributes:
        name: The name that the user passed.
        documents: The documents in a fixed order; of a single text, parts of it.
        separator: The text between two documents when they are joined.
        by_document: Whether calibration windows are drawn inside single documents, as
            in the paper for C4, or from the joined text.
        token_limit: The maximum number of evaluation segments; None for all. The paper
            evaluates on the first 256 of C4.
    """

    name: str
    documents: Sequence[str]
    separator: str
    by_document: bool = False
    token_limit: int | None = None

    def parts(self) -> Iterator[str]:
        """Yield the text of all documents, joined by the separator, in parts."""
        for number, document in enumerate(self.documents):
            if number:
                yield self.separator
            yield from self.parts_of(document)

    @staticmethod
    def parts_of(document: str) -> Iterator[str]:
        """Yield a document in parts."""
        for start in range(0, len(document), _PART):
            yield document[start : start + _PART]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the joined text in UTF-8, hexadecimal."""
        digest = hashlib.sha256()
        for part in self.parts():
            digest.update(part.encode("utf-8", "replace"))
        return digest.hexdigest()


def load_corpus(name: str, part: Part, render: Render | None = None) -> Corpus:
    """Load the text of a name.

    Args:
        name: c4, wikitext2, ptb, stdlib, a file, or a data set: a folder, or a name on
            the Hub. Configuration, split and column of a data set may follow:
            `owner/name:configuration:split:column`, and the column of a file.
        part: Whether to load the text for calibration or that for evaluation. A file
            is used for both.
        render: Renders conversations (`ChatTemplate`); None to refuse them.

    Raises:
        SourceError: The file or data set does not exist, or the Hub is not reachable.
        CalibrationError: It has no text, or cannot be read as text.
    """
    corpus = _load(name, part, render)
    if all(not text or text.isspace() for text in corpus.documents):
        raise CalibrationError(
            f"There is no text in {name}.",
            "Use a file or data set whose `text` is not empty.",
        )
    return corpus


def corpus_nbytes(name: str, part: Part) -> int:
    """Return about how many bytes of memory the text of a name takes.

    Of a data set, documents are read from its memory-mapped file when they are drawn,
    or at most some ten thousand of them beforehand, which count as nothing.

    Raises:
        SourceError, CalibrationError: As `load_corpus`, where the size tells.
    """
    if name == "stdlib":
        return sum(path.stat().st_size for path in _sources(part))
    if name in _NAMED:
        return 0
    parsed, path, _ = parse_text_name(name)
    return text_nbytes(path, column_of_file(parsed)) if path.is_file() else 0


def _load(name: str, part: Part, render: Render | None) -> Corpus:
    if name in _NAMED:
        return _NAMED[name](part)
    parsed, path, is_file = parse_text_name(name)
    if is_file:
        documents = read_file(path, column_of_file(parsed) or None, render)
        if path.suffix == ".txt":
            return Corpus(name, documents, "")
        return Corpus(name, documents, "\n\n", by_document=True)
    documents = read_data_set(parsed, _SPLITS[part], render)
    return Corpus(name, documents, "\n\n", by_document=part == "calibration")


def _c4(part: Part) -> Corpus:
    if part == "calibration":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        documents = _hub_rows("allenai/c4", "train", "text", data_files=files)
        return Corpus("c4", documents, " ", by_document=True)
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    documents = _hub_rows("allenai/c4", "validation", "text", data_files=files)
    return Corpus("c4", documents[:1100], " ", token_limit=256)


def _wikitext2(part: Part) -> Corpus:
    source = ("Salesforce/wikitext", _SPLITS[part], "text")
    rows = _hub_rows(*source, name="wikitext-2-raw-v1")
    return Corpus("wikitext2", rows, " " if part == "calibration" else "\n\n")


def _ptb(part: Part) -> Corpus:
    source = ("ptb-text-only/ptb_text_only", _SPLITS[part], "sentence")
    rows = _hub_rows(*source, revision="refs/convert/parquet")
    return Corpus("ptb", rows, " ")


_SPLITS = {"calibration": "train", "evaluation": "test"}
# Files that are not typical source code; see the README of the bundled model.
_NOT_SOURCES = (
    "site-packages",
    "/test/",
    "/tests/",
    "/idlelib/",
    "topics.py",
    "/encodings/",
)


def _stdlib(part: Part) -> Corpus:
    """One document per module; a tenth of them, chosen by hash, is for evaluation."""
    documents = tuple(text for path in _sources(part) if (text := _read_source(path)))
    return Corpus("stdlib", documents, "\n", by_document=part == "calibration")


def _sources(part: Part) -> list[Path]:
    """Return the modules of a part of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not any(
            name in f"/{path.relative_to(root).as_posix()}" for name in _NOT_SOURCES
        )
        and _is_held_out(path.relative_to(root).as_posix()) == (part == "evaluation")
    ]


def _is_held_out(relative_path: str) -> bool:
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 10 == 0


def _read_source(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True)
class _Column(Sequence):
    """A column of a data set, which is read from its memory-mapped file when asked."""

    rows: Any
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        if isinstance(index, slice):
            return _Column(self.rows.select(range(len(self))[index]), self.name)
        return str(self.rows[index][self.name])


def _hub_rows(
    repository: str,
    split: str,
    column: str,
    **options: Any,  # noqa: ANN401
) -> Sequence[str]:
    from datasets import load_dataset  # noqa: PLC0415  (slow to import)

    try:
        rows = load_dataset(repository, split=split, **options)
        return _Column(rows, column)
    except Exception as error:  # including whatever its network layer raises
        raise loading_error(DataSetName(repository), error) from error


_NAMED: dict[str, Callable[[Part], Corpus]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "stdlib": _stdlib,
}
