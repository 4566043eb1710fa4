"""Perplexity and divergence, block by block, against a direct computation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import halve
from halve.errors import CalibrationError
from halve.evaluation import compare, evaluate
from halve.options import EvalOptions
from tests.tables import BUNDLED


def plain_logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def segments(text, length, count):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


@pytest.mark.parametrize("row", ["gpt2", "llama", "bloom"])
def test_perplexity_equals_the_direct_computation(row, pico, text):
    found = evaluate(pico(row), EvalOptions(data=str(text), seq_len=32, segments=5))
    ids = segments(text, 32, 5)
    logits = plain_logits(pico(row), ids)[:, :-1]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    means = losses.view(5, 31).mean(dim=1)
    assert found.perplexity == pytest.approx(means.mean().exp().item(), rel=1e-5)
    error = means.mean().exp() * means.std() / 5**0.5
    assert found.standard_error == pytest.approx(error.item(), rel=1e-3)
    assert (found.tokens, found.seq_len, found.segments) == (155, 32, 5)


def test_divergence_equals_the_direct_computation(pico, text, tmp_path):
    dense, out = pico("gpt2"), tmp_path / "out"
    halve.prune(dense, out, sparsity="70%", solver="magnitude")
    found = halve.compare(out, dense, data=str(text), seq_len=32, segments=6)
    ids = segments(text, 32, 6)
    log_q, log_p = (
        plain_logits(folder, ids)[:, :-1].log_softmax(-1) for folder in (out, dense)
    )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).flatten()
    assert found.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert found.kl_median == pytest.approx(divergence.median().item(), rel=1e-3)
    assert found.kl_99 == pytest.approx(
        divergence.sort().values[-(-99 * len(divergence) // 100) - 1].item(), rel=1e-3
    )
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert found.agreement == pytest.approx(same, abs=0.01)
    assert found.reference == evaluated_like(dense, text, found.reference)


def evaluated_like(model, text, record):
    """Return a model's record, with the duration of another record."""
    evaluated = evaluate(model, EvalOptions(data=str(text), seq_len=32, segments=6))
    return replace(evaluated, seconds=record.seconds)


def test_a_model_does_not_diverge_from_itself(pico, text):
    found = compare(
        pico("llama"),
        pico("llama"),
        EvalOptions(data=str(text), seq_len=32, segments=4),
    )
    assert found.kl_mean == pytest.approx(0, abs=1e-9)
    assert found.agreement == 1
    assert found.model.perplexity == found.reference.perplexity


def test_small_batches_and_a_mapped_file_change_nothing(pico, text):
    resident = EvalOptions(data=str(text), seq_len=32, segments=9)
    mapped = EvalOptions(data=str(text), seq_len=32, segments=9, activation_memory=0)
    first, second = evaluate(pico("opt"), resident), evaluate(pico("opt"), mapped)
    assert first.perplexity == second.perplexity


def test_too_long_segments_are_refused(pico, text):
    with pytest.raises(CalibrationError, match="supports at most 128"):
        halve.perplexity(pico("llama"), data=str(text), seq_len=129)


def test_too_short_segments_are_refused(pico, text):
    for length in (0, 1):
        with pytest.raises(CalibrationError, match=f"seq_len is {length}"):
            halve.perplexity(pico("llama"), data=str(text), seq_len=length)


def test_the_bundled_model_has_the_perplexity_of_its_training():
    found = halve.perplexity(BUNDLED, data="stdlib", segments=40)
    assert 8 < found.perplexity < 17
