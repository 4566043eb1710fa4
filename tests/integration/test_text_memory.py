"""Memory of reading the calibration text, as the dry run predicts it."""

import shutil
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import halve
from halve.models import cache_width
from halve.pruning.memory.text import text_phases
from halve.runtime import generation as generation_module
from halve.runtime.generation import windows_at_once
from tests.tables import BUNDLED, FAMILIES, MIXTURES, family_config

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

    # Keys and values in two blocks, 64 wide, of one and of all windows, in float32.
    window = 2 * 2 * 64 * 32 * 4
    model = {
        "the whole model": halve.inspect(pico("opt")).bytes,
        "keys and values": window,
    }
    both = phases(calibration=str(text), self_samples=1)
    assert both["sampling windows"] == model
    assert "reading text" in both
    alone = phases(calibration="self")
    assert alone["sampling windows"] == model | {"keys and values": 4 * window}
    assert "reading text" not in alone
    assert "sampling windows" not in phases(calibration=str(text))


def test_a_model_samples_with_all_its_experts(pico, text):
    options: dict[str, Any] = {"calibration": str(text), "self_samples": 1}
    whole = halve.inspect(pico("mixtral")).bytes
    planned = halve.plan(pico("mixtral"), experts="50%", **SIZES, **options)
    assert planned.forecast.by_name()["sampling windows"]["the whole model"] == whole


# Whose caches are as long as the text, of all heads, and not of a state.
SLIDING = {"mistral", "gemma2", "gemma3", "gpt_oss", "gemma4"}
SHARED = {"falcon"}  # all heads share their keys
WHOLE_CACHES = sorted(
    {*FAMILIES, *MIXTURES}
    - SLIDING
    - SHARED
    - {"qwen3_next", "nemotron_h", "jamba", "lfm2_moe"}  # recurrences
    - {"gpt_neox"}  # its config here has an entry of Llama's, which it ignores
)


def kept(row) -> tuple[int, int]:
    """Return the numbers in the cache of 20 tokens, and how many are predicted."""
    config = family_config(row)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.full((1, 20), 7), use_cache=True).past_key_values
    parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return sum(part.numel() for part in parts), 20 * cache_width(config)


@pytest.mark.parametrize("row", WHOLE_CACHES)
def test_a_cache_is_as_wide_as_its_config_says(row):
    found, predicted = kept(row)
    assert found == predicted


@pytest.mark.parametrize("row", sorted(SLIDING | SHARED))
def test_a_cache_that_keeps_less_is_counted_as_more(row):
    found, predicted = kept(row)
    assert 0 < found < predicted


def test_fewer_windows_are_sampled_together_where_they_keep_much():
    assert windows_at_once(2**20) == 32
    assert windows_at_once(2**28) == 8
    assert windows_at_once(2**40) == 1


def test_a_cache_that_exceeds_the_limit_is_sampled_in_parts(pico, monkeypatch):
    sampled: list[int] = []

    def sample(model, batch, length):
        sampled.append(len(batch))
        return batch.repeat(1, length)

    monkeypatch.setattr(generation_module, "_sample", sample)
    monkeypatch.setattr(generation_module, "_CACHE_NBYTES", 3 * 2 * 2 * 64 * 16 * 4)
    windows = generation_module.sample_windows(pico("opt"), 7, 16, seed=0)
    assert windows.shape == (7, 16)
    assert sampled == [3, 3, 1]
