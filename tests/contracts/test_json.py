"""What is printed as JSON is JSON, and any text can be printed anywhere."""

import io
import json
import shutil
import sys

import pytest
import torch

from halve.cli import main
from halve.records.checksum import has_valid_checksum, to_json_with_checksum
from halve.records.codec import to_json
from tests.hostile import spoilers as by

NAN, INFINITY = float("nan"), float("inf")


def parse(text):
    """Parse a text as strict parsers do, which know no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": NAN, "b": [INFINITY, (1.5, -INFINITY)], "c": {"d": NAN}, "e": "NaN"}
    expected = {"a": None, "b": [None, [1.5, None]], "c": {"d": None}, "e": "NaN"}
    assert parse(to_json(value)) == expected
    record = to_json_with_checksum(value)
    assert parse(record)["a"] is None
    assert has_valid_checksum(record.encode())


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capfd.readouterr().out

    return run


def test_one_segment_has_no_standard_error(run, pico, text):
    words = ("--data", text, "--segments", 1, "--seq-len", 32, "--quiet")
    record = parse(run("eval", pico("llama"), *words, "--json"))
    assert record["standard_error"] is None
    assert record["perplexity"] > 1
    assert "without a standard error" in run("eval", pico("llama"), *words)
    compared = run("eval", pico("llama"), *words, "--against", pico("llama"), "--json")
    assert parse(compared)["reference"]["standard_error"] is None


def test_the_record_of_a_model_of_zeros_is_json(pico, text, tmp_path, run):
    """Nothing is lost of outputs that are zero: no 0 / 0."""
    words = ("--calibration", text, "--samples", 4, "--seq-len", 32, "--quiet")
    source = shutil.copytree(pico("llama"), tmp_path / "zeros")
    by.tensor("model.embed_tokens.weight", torch.zeros_like)(source)
    out = tmp_path / "out"
    record = run("prune", source, "-o", out, *words, "--solver", "wanda", "--json")
    assert parse(record) == parse((out / "halve.json").read_text())
    assert all(block["error"] == 0 for block in parse(record)["blocks"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_can_be_printed(encoding, monkeypatch, pico):
    """`halve generate` printed nothing of the text that it had generated."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    words = ["halve", "generate", str(pico("llama")), "# caf\u00e9 \u65e5\u672c"]
    monkeypatch.setattr(sys, "argv", [*words, "--max-new-tokens", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    stream.flush()
    assert raw.getvalue().decode(encoding).startswith("# caf")


def test_a_prompt_that_the_locale_cannot_decode(run, pico):
    """Its bytes arrive as surrogates, which tokenizers do not take."""
    prompt = "# caf\u00e9".encode().decode("ascii", "surrogateescape")
    words = ("generate", pico("llama"), prompt, "--max-new-tokens", 1)
    assert run(*words).startswith("# caf\u00e9")
