"""BOS in front of windows: where, and that the same tokens are predicted without."""

import json
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import halve
from halve.calibration import automatic_bos, load_encoder
from halve.cli import main
from halve.options import PruneOptions, RunOptions
from halve.pruning.plan import make_plan
from halve.pruning.windows import calibration_windows
from tests.tables import BUNDLED

BOS = 1
LENGTH = 24


@pytest.fixture(scope="module")
def with_bos(pico, tmp_path_factory):
    """Return a function from a family to its model, whose tokenizer adds BOS."""

    def folder(row):
        path = tmp_path_factory.mktemp("bos") / row
        shutil.copytree(pico(row), path)
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
        tokenizer.save_pretrained(path)
        return path

    folders = {row: folder(row) for row in ("llama", "opt", "bloom", "gpt2")}
    return folders.__getitem__


def windows(folder, text, **options) -> Any:
    given = {"calibration": str(text), "samples": 6, "seq_len": LENGTH} | options
    plan = make_plan(folder, PruneOptions(**given))
    return calibration_windows(plan, RunOptions().trust_remote_code)


def test_a_tokenizer_that_adds_no_bos_by_itself_has_none(with_bos):
    assert automatic_bos(AutoTokenizer.from_pretrained(BUNDLED)) is None
    assert automatic_bos(AutoTokenizer.from_pretrained(with_bos("llama"))) == BOS


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_window_begins_with_bos_and_goes_on_as_text(
    kind, with_bos, text, tmp_path
):
    path = tmp_path / f"text.{kind}"
    written = text.read_text()[:60_000]
    path.write_text(written if kind == "txt" else json.dumps({"text": written}))
    found = windows(with_bos("llama"), path)
    plain = windows(with_bos("llama"), path, bos="never")
    assert (found.bos, plain.bos) == (BOS, None)
    assert (found.ids[:, 0] == BOS).all()
    assert not (found.ids[:, 1:] == BOS).any()
    assert found.ids.shape == plain.ids.shape == (6, LENGTH)
    tokens = AutoTokenizer.from_pretrained(BUNDLED)(written)["input_ids"]
    joined = " ".join(map(str, tokens))
    for window in found.ids[:, 1:].tolist():
        assert " ".join(map(str, window)) in joined


@pytest.mark.parametrize("row", ["opt", "bloom", "gpt2"])
def test_families_of_the_papers_keep_their_protocol(row, with_bos, text):
    """Windows are cut from the whole text, tokenized once, special tokens included."""
    found = windows(with_bos(row), text)
    assert found.bos is None
    assert torch.equal(found.ids, windows(with_bos(row), text, bos="never").ids)
    record = halve.perplexity(with_bos(row), data=str(text), seq_len=LENGTH, segments=2)
    assert record.bos is None


def test_text_sampled_from_the_model_begins_with_bos(with_bos):
    found = windows(with_bos("llama"), "self", samples=2)
    assert (found.ids[:, 0] == BOS).all()
    assert found.ids.shape == (2, LENGTH)
    assert windows(with_bos("llama"), "self", samples=2, bos="never").bos is None


def test_the_same_targets_are_predicted_with_and_without(with_bos, text):
    folder = with_bos("llama")
    given = {"data": str(text), "seq_len": LENGTH, "segments": 5}
    found = {
        bos: halve.perplexity(folder, **given, bos=bos) for bos in ("auto", "never")
    }
    assert (found["auto"].bos, found["never"].bos) == (BOS, None)
    assert found["auto"].tokens == found["never"].tokens == 5 * (LENGTH - 1)
    encode = load_encoder(folder, adds_bos=True)
    ids = torch.tensor(encode(text.read_text())[: 5 * LENGTH]).view(5, LENGTH)
    expected = plain_perplexity(folder, ids, with_bos=True)
    assert found["auto"].perplexity == pytest.approx(expected, rel=1e-5)
    assert found["auto"].perplexity != pytest.approx(
        plain_perplexity(folder, ids, with_bos=False), rel=1e-5
    )


def plain_perplexity(folder, ids, with_bos):
    """Predict ids[:, 1:] by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = torch.cat((torch.full((len(ids), 1), BOS), ids), 1) if with_bos else ids
    with torch.no_grad():
        logits = model(read, use_cache=False).logits[:, int(with_bos) :]
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1).mean(1).mean().exp().item()


def test_records_and_printed_lines_say_which(with_bos, text, tmp_path, run):
    folder, out = with_bos("llama"), tmp_path / "out"
    size = ["--seq-len", LENGTH]
    calibration = ["--calibration", text, *size, "--samples", 4, "--solver", "wanda"]
    printed = run("prune", folder, "-o", out, *calibration)
    assert f"windows of {LENGTH} tokens of {text}, each after BOS." in printed
    identity = json.loads((out / "halve.json").read_text())["identity"]
    assert (identity["bos"], identity["bos_id"]) == ("auto", BOS)
    judged = ["eval", out, "--data", text, *size, "--segments", 2]
    assert f"2 segments of {LENGTH} after BOS," in run(*judged)
    assert f"2 segments of {LENGTH}, " in run(*judged, "--bos", "never")


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command line and returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments), "--quiet"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    return run


def test_models_read_with_and_without_bos_are_not_compared(with_bos, pico, text):
    given = {"data": str(text), "seq_len": LENGTH, "segments": 2}
    with pytest.raises(halve.CalibrationError, match="same tokens"):
        halve.compare(with_bos("llama"), pico("llama"), **given)
    same = halve.compare(with_bos("llama"), with_bos("llama"), **given)
    assert same.kl_mean == pytest.approx(0, abs=1e-9)
    assert replace(same.model, seconds=0.0) == replace(same.reference, seconds=0.0)


def test_windows_that_the_model_samples_begin_with_bos_as_well(with_bos, text):
    found = windows(with_bos("llama"), text, self_samples=3)
    assert found.ids.shape == (6, LENGTH)
    assert (found.ids[:, 0] == BOS).all()
