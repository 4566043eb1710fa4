"""Memory of reading the calibration text, as the dry run predicts it."""

import shutil
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

import halve
from halve.pruning.memory.text import text_phases
from tests.tables import BUNDLED

SIZES: dict[str, Any] = {"samples": 4, "seq_len": 32}


def phase(folder, text, **options) -> Any:
    found = halve.plan(folder, calibration=str(text), **SIZES, **options)
    return found.forecast.by_name().get("reading text")


@pytest.fixture(scope="module")
def uncut(pico, tmp_path_factory):
    """Return a model with a tokenizer for which texts cannot be cut."""
    folder = tmp_path_factory.mktemp("uncut") / "model"
    shutil.copytree(pico("opt"), folder)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?<=a)b|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_the_forecast_counts_text_and_tokens(pico, uncut, text):
    size = text.stat().st_size
    assert phase(pico("opt"), text) == {"text": 2 * size, "tokens": int(1.5 * size)}
    whole = phase(uncut, text)
    assert whole == {"text": 2 * size, "the whole text, tokenized at once": 165 * size}


def test_no_text_is_counted_where_none_is_read(pico, text):
    assert phase(pico("opt"), text, solver="magnitude") is None


def test_a_large_text_determines_the_peak_and_is_refused(uncut, text, tmp_path):
    large = tmp_path / "large.txt"
    large.write_text(text.read_text() * 20)
    forecast = halve.plan(uncut, calibration=str(large), **SIZES).forecast
    assert forecast.largest.name == "reading text"
    assert forecast.peak == forecast.process + 167 * large.stat().st_size
    with pytest.raises(halve.HalveError, match="tokenized at once"):
        halve.plan(uncut, calibration=str(large), **SIZES, memory=forecast.peak - 1)


def test_sizes_of_other_kinds_of_text(pico, text, tmp_path):
    from pyarrow import Table, parquet  # noqa: PLC0415  (only here)

    path = tmp_path / "text.parquet"
    written = text.read_text()
    parquet.write_table(Table.from_pydict({"text": [written], "n": [1]}), path)
    assert phase(pico("opt"), path)["text"] == pytest.approx(2 * len(written), rel=0.02)
    assert phase(pico("opt"), "stdlib")["text"] > 2**20
    assert phase(pico("opt"), "c4")["text"] == 0
    plan = halve.plan(pico("opt"), calibration=str(path), **SIZES).plan
    assert [p.has_activations for p in text_phases(plan)] == [False]


def test_the_whole_model_is_counted_where_it_samples_windows(pico, text):
    def phases(**options) -> dict[str, Any]:
        return halve.plan(pico("opt"), **SIZES, **options).forecast.by_name()

    model = {"the whole model": halve.inspect(pico("opt")).bytes}
    both = phases(calibration=str(text), self_samples=1)
    assert both["sampling windows"] == model
    assert "reading text" in both
    alone = phases(calibration="self")
    assert alone["sampling windows"] == model
    assert "reading text" not in alone
    assert "sampling windows" not in phases(calibration=str(text))
