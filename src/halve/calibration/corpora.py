"""Load text by name, for calibration or for evaluation.

`c4`, `wikitext2` and `ptb` are loaded and cut as in the SparseGPT paper; any other name
is a data set on the Hub; a path is a local .txt, .jsonl or .parquet file; `stdlib` is
the source code of the running Python's standard library, which needs no network.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from halve.calibration.parquet_limits import check_pages
from halve.errors import CalibrationError, SourceError

Part = Literal["calibration", "evaluation"]

# Documents to read of a data set of unknown size: enough to draw windows from.
_MAX_DOCUMENTS = 20_000
# Bytes of a text file; calibration needs some megabytes.
_MAX_BYTES = 2**30
# Bytes of a line of .jsonl; parsing it takes up to twenty times as much memory.
_MAX_LINE = 2**24
# Text compresses to a tenth. A .parquet whose contents are larger than these many times
# its size, and than some megabytes, is treated as a decompression bomb.
_MAX_GROWTH = 50
_SMALL = 2**25
_FOOTER_LIMITS: dict[str, Any] = {
    "thrift_string_size_limit": 2**24,
    "thrift_container_size_limit": 2**20,
}
# Characters of a part of a text, or of a file that is one text. Each part takes one,
# two or four bytes a character: an emoji somewhere does not widen the whole.
_PART = 2**18
# Bytes that a document takes in a list, apart from its text.
_POINTER = 8


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


def load_corpus(name: str, part: Part) -> Corpus:
    """Load the text of a name.

    Args:
        name: c4, wikitext2, ptb, stdlib, a file, or a data set on the Hub
            (`owner/name`, or `owner/name:configuration`).
        part: Whether to load the text for calibration or that for evaluation. A file
            is used for both.

    Raises:
        SourceError: The file or data set does not exist, or the Hub is not reachable.
        CalibrationError: It has no text, or cannot be read as text.
    """
    corpus = _load(name, part)
    if all(not text or text.isspace() for text in corpus.documents):
        raise CalibrationError(
            f"There is no text in {name}.", "Use a file or data set that has text."
        )
    return corpus


def corpus_nbytes(name: str, part: Part) -> int:
    """Return about how many bytes of memory the text of a name takes.

    Of a data set on the Hub, documents are read from its memory-mapped file when they
    are drawn, or at most some ten thousand of them beforehand, which count as nothing.

    Raises:
        SourceError, CalibrationError: As `load_corpus`, where the size tells.
    """
    if name == "stdlib":
        return sum(path.stat().st_size for path in _sources(part))
    path = _path_of(name)
    if name in _NAMED or not path.is_file():
        return 0
    if path.suffix == ".parquet":
        return _text_nbytes(path)
    return path.stat().st_size


def _load(name: str, part: Part) -> Corpus:
    if name in _NAMED:
        return _NAMED[name](part)
    path = _path_of(name)
    if path.suffix in _READERS or path.exists():
        return _from_file(name, path)
    return _from_hub(name, part)


def _path_of(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, or ~user unknown
        raise SourceError(
            f"{name[:200]!r} is not the name of a text.", "Use a file or a data set."
        ) from error
    return path


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
        if not any(name in f"/{path.relative_to(root)}" for name in _NOT_SOURCES)
        and _is_held_out(path.relative_to(root).as_posix()) == (part == "evaluation")
    ]


def _is_held_out(relative_path: str) -> bool:
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % 10 == 0


def _read_source(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _from_file(name: str, path: Path) -> Corpus:
    if not path.is_file():
        raise SourceError(f"There is no file {path}.", "Check the path of the text.")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise CalibrationError(
            f"{path} is not of a type that Halve reads.",
            f"Use a file that ends in {', '.join(_READERS)}.",
        )
    try:
        _check_size(path)
        documents = reader(path)
    except Exception as error:  # pyarrow raises errors of many types
        raise CalibrationError(
            f"{path} cannot be read as {path.suffix} ({type(error).__name__}: "
            f"{str(error)[:200].rstrip('. ')}).",
            "A .jsonl file must have an object with a `text` on each line, a .parquet "
            "file a column `text` of strings, and a .txt file must be UTF-8.",
        ) from error
    if path.suffix == ".txt":
        return Corpus(name, documents, "")
    return Corpus(name, documents, "\n\n", by_document=True)


def _read_txt(path: Path) -> tuple[str, ...]:
    """Return the parts of a text."""
    with path.open(encoding="utf-8") as file:
        return tuple(iter(lambda: file.read(_PART), ""))


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"it has {size} bytes; the limit is {_MAX_BYTES}")


def _read_jsonl(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(_MAX_LINE + 1), b"")
        return tuple(_text_of_line(line) for line in lines if line.strip())


def _text_of_line(line: bytes) -> str:
    if len(line) > _MAX_LINE:
        raise ValueError(f"a line has more than {_MAX_LINE} bytes")
    return _checked(json.loads(line.decode("utf-8"))["text"])


def _read_parquet(path: Path) -> tuple[str, ...]:
    from pyarrow import parquet  # noqa: PLC0415  (slow to import, seldom needed)

    budget = max(_SMALL, _MAX_GROWTH * path.stat().st_size)
    check_pages(path, "text", budget)
    documents: list[str] = []
    # Read as a dictionary: a text that is repeated a million times is then stored once.
    with parquet.ParquetFile(path, read_dictionary=["text"], **_FOOTER_LIMITS) as file:
        for batch in file.iter_batches(columns=["text"]):
            texts = _texts_of(batch.column("text"))
            budget -= sum(len(text) + _POINTER for text in texts)
            if budget < 0:
                raise ValueError("its texts are far larger than the file")
            documents += texts
    return tuple(documents)


def _text_nbytes(path: Path) -> int:
    """Return the bytes of the texts of a .parquet, as its footer gives them."""
    from pyarrow import parquet  # noqa: PLC0415

    try:
        with parquet.ParquetFile(path, **_FOOTER_LIMITS) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            columns = (g.column(i) for g in groups for i in range(g.num_columns))
            sizes = [
                c.total_uncompressed_size for c in columns if c.path_in_schema == "text"
            ]
    except Exception:  # noqa: BLE001  (the run will report it)
        return path.stat().st_size
    return sum(sizes)


def _texts_of(column: Any) -> list[str]:  # noqa: ANN401
    if not hasattr(column, "dictionary"):
        raise TypeError(f"`text` is a column of {column.type}")
    if column.null_count:
        raise TypeError("a `text` is missing")
    texts = [_checked(text) for text in column.dictionary.to_pylist()]
    return [texts[number] for number in column.indices.to_pylist()]


def _checked(text: object) -> str:
    """Return a text, with `?` for lone surrogates, which tokenizers do not accept."""
    if isinstance(text, str):
        return text if text.isascii() else text.encode("utf-8", "replace").decode()
    raise TypeError(f"a `text` is a {type(text).__name__}")


_READERS: dict[str, Callable[[Path], tuple[str, ...]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _from_hub(name: str, part: Part) -> Corpus:
    """Read the first text column of a data set, streamed, up to a maximum of rows."""
    repository, _, configuration = name.partition(":")
    options = {"name": configuration} if configuration else {}
    rows = _hub_rows(repository, _SPLITS[part], None, streaming=True, **options)
    return Corpus(name, rows, "\n\n", by_document=part == "calibration")


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
    column: str | None,
    **options: Any,  # noqa: ANN401
) -> Sequence[str]:
    from datasets import load_dataset  # noqa: PLC0415  (slow to import)

    try:
        rows = load_dataset(repository, split=split, **options)
        if column is not None:
            return _Column(rows, column)
        return tuple(str(_text_of(row)) for row in islice(rows, _MAX_DOCUMENTS))
    except Exception as error:  # including whatever its network layer raises
        raise SourceError(
            f"The data set {repository} (split {split}) could not be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}).",
            "Check the name and the network, or pass a local .txt, .jsonl or .parquet "
            "file, or `stdlib`.",
        ) from error


def _text_of(row: Any) -> Any:  # noqa: ANN401
    return next(v for k, v in row.items() if k == "text" or isinstance(v, str))


_NAMED: dict[str, Callable[[Part], Corpus]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "stdlib": _stdlib,
}
