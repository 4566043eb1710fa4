"""Text to windows of tokens, tokenizers, and storage for hidden states."""

import json
import os
import signal
import sys

import pytest
import torch
from transformers import AutoTokenizer

from halve.calibration import (
    Corpus,
    allocate_hidden,
    cut_segments,
    draw_windows,
    load_corpus,
    load_tokenizer,
)
from halve.cli import main
from halve.cli.interruption import Interrupted
from halve.errors import (
    CalibrationError,
    DistributedError,
    OutputError,
    SourceError,
)


class Words:
    """One token per word: the number that the word is."""

    def __init__(self, bos: int | None = None):
        self.bos = bos

    def stream(self, parts):
        yield [int(word) for word in "".join(parts).split()]


encode = Words()


def numbers(start: int, count: int) -> str:
    return " ".join(str(number) for number in range(start, start + count))


DOCUMENTS = Corpus(
    "numbers",
    (numbers(0, 30), numbers(1000, 500), numbers(2000, 80)),
    " ",
    by_document=True,
)


def test_windows_of_documents_lie_within_one():
    windows = draw_windows(DOCUMENTS, encode, samples=40, length=50, seed=0)
    assert windows.shape == (40, 50)
    assert windows.dtype == torch.int64
    assert torch.equal(windows.diff(dim=1), torch.ones(40, 49, dtype=torch.int64))
    assert (windows[:, 0] >= 1000).all()  # the first document is too short


def test_a_document_that_is_drawn_often_is_encoded_once():
    class Counting(Words):
        encoded = 0

        def stream(self, parts):
            self.encoded += 1
            return super().stream(parts)

    counting = Counting()
    windows = draw_windows(DOCUMENTS, counting, samples=40, length=10, seed=0)
    assert counting.encoded == 3
    assert torch.equal(windows, draw_windows(DOCUMENTS, encode, 40, 10, 0))


def test_windows_of_a_text_lie_anywhere_in_it():
    text = Corpus("text", (numbers(0, 300), numbers(300, 300)), " ")
    windows = draw_windows(text, encode, samples=10, length=50, seed=0)
    assert torch.equal(windows.diff(dim=1), torch.ones(10, 49, dtype=torch.int64))
    assert len(set(windows[:, 0].tolist())) > 5


def test_short_documents_are_joined():
    short = Corpus("short", tuple(numbers(i, 5) for i in range(100)), " ", True)
    assert draw_windows(short, encode, samples=4, length=50, seed=0).shape == (4, 50)


def test_the_seed_decides():
    draws = [draw_windows(DOCUMENTS, encode, 8, 50, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_little_text_is_refused_with_numbers():
    with pytest.raises(CalibrationError, match=r"30 tokens, too few for 2 .* of 20"):
        draw_windows(Corpus("t", (numbers(0, 30),), " "), encode, 2, 20, 0)
    with pytest.raises(CalibrationError, match="too few for one segment of 40"):
        cut_segments(Corpus("t", (numbers(0, 30),), " "), encode, 40)


def test_segments_follow_each_other_and_drop_the_rest():
    text = Corpus("text", (numbers(0, 25),), " ")
    found = cut_segments(text, encode, 10)
    assert found.ids.tolist() == [list(range(10)), list(range(10, 20))]
    assert torch.equal(found.targets, found.ids[:, 1:])
    assert len(cut_segments(text, encode, 5, limit=3).ids) == 3


def test_bos_takes_the_place_of_the_last_token_that_is_read():
    text = Corpus("text", (numbers(0, 25),), " ")
    found, plain = (cut_segments(text, Words(bos), 10) for bos in (99, None))
    assert found.ids.tolist() == [[99, *range(9)], [99, *range(10, 19)]]
    assert torch.equal(found.targets, plain.targets)
    for segments in (found, plain):
        # Logits that say which token was read last: the one before the target.
        logits = segments.ids[..., None]
        assert torch.equal(segments.predictions(logits)[..., 0] + 1, segments.targets)
    drawn, without = (draw_windows(text, Words(bos), 2, 10, 0) for bos in (99, None))
    assert (drawn[:, 0] == 99).all()
    assert torch.equal(drawn[:, 1:], without[:, :-1])


def test_local_files_are_read(tmp_path):
    from pyarrow import Table, parquet  # noqa: PLC0415  (only here)

    texts = ["one\ntwo", "three"]
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    parquet.write_table(Table.from_pydict({"text": texts}), tmp_path / "a.parquet")
    documents = [
        load_corpus(str(tmp_path / f"a.{kind}"), "calibration").documents
        for kind in ("txt", "jsonl", "parquet")
    ]
    assert documents == [("one\ntwo",), ("one\ntwo", "three"), ("one\ntwo", "three")]


def test_the_parts_of_stdlib_share_no_module():
    training, held_out = (
        load_corpus("stdlib", part) for part in ("calibration", "evaluation")
    )
    assert not set(training.documents) & set(held_out.documents)
    assert 0.05 < len(held_out.documents) / len(training.documents) < 0.2
    assert held_out.separator == "\n"


@pytest.mark.parametrize("budget", [0, 10**6])
def test_hidden_states_are_in_memory_or_in_a_file(budget, tmp_path):
    hidden = allocate_hidden((3, 4, 5), budget, tmp_path)
    hidden.copy_(torch.arange(60.0).view(3, 4, 5))
    assert hidden.sum() == 59 * 30
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_disk_too_small_for_hidden_states_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="hidden states need"):
        allocate_hidden((2**20, 2**20, 2**10), 0, tmp_path)


class PanicException(BaseException):
    """As PyO3 raises the panics of tokenizers."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [ValueError("bad"), PanicException("bad")])
def test_what_tokenizers_raises_is_a_source_error(error, monkeypatch, tmp_path):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
    with pytest.raises(SourceError, match=r"tokenizer .* cannot be loaded \(bad\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "error", [Interrupted(15), KeyboardInterrupt(), SystemExit(3), GeneratorExit()]
)
def test_signals_and_exits_pass_through_loading_a_tokenizer(
    error, monkeypatch, tmp_path
):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
    with pytest.raises(type(error)) as raised:
        load_tokenizer(tmp_path)
    assert raised.value is error


def test_an_error_of_halve_passes_through_loading_a_tokenizer(monkeypatch, tmp_path):
    """Such as that another process of the run has failed."""
    error = DistributedError("Another process has ended.", "Run the command again.")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", raising(error))
    with pytest.raises(DistributedError):
        load_tokenizer(tmp_path)


def test_sigterm_while_the_tokenizer_loads_exits_with_143(pico, text, monkeypatch):
    words = ["halve", "eval", str(pico("opt")), "--data", str(text)]
    monkeypatch.setattr(sys, "argv", words)

    def load(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 143


def raising(error):
    """Return a function that raises an error, whatever it is passed."""

    def function(*_, **__):
        raise error

    return function
