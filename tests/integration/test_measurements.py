"""Evaluations and benchmarks that are kept beside an output."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import halve
from halve import system
from halve.checkpoint import MEASUREMENTS
from halve.cli.app import app
from halve.errors import CheckpointError, HalveError
from halve.evaluation.divergence import summarize
from halve.measure import check_keepable, keep_measurement
from halve.options import EvalOptions
from halve.pruning import loop as loop_module
from halve.pruning import prune as prune_module
from halve.records import BenchRecord, ComparisonRecord, PerplexityRecord
from halve.records.stored import read_measurements

DATA = EvalOptions(seq_len=32, segments=3)


@pytest.fixture(scope="module")
def pruned(pico, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "out"
    halve.prune(pico("gpt2"), out, solver="magnitude")
    return out


@pytest.fixture(scope="module")
def compared(pico, pruned, text):
    return halve.compare(pruned, pico("gpt2"), options=DATA, data=str(text))


@pytest.fixture
def out(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "out")


def test_statistics_are_those_of_all_tokens():
    torch.manual_seed(0)
    segments = [torch.rand(101).double() ** 8 for _ in range(10)]
    agreed = [torch.rand(101) < 0.9 for _ in range(10)]
    found = summarize(segments, agreed)
    values = torch.cat(segments).sort().values
    assert found["kl_mean"] == pytest.approx(float(values.mean()))
    assert found["kl_max"] == float(values[-1]) == found["kl_quantiles"]["100"]
    assert found["kl_99"] == found["kl_quantiles"]["99"] == float(values[999])
    assert found["kl_quantiles"]["99.9"] == float(values[1008])
    assert found["kl_quantiles"]["0.1"] == float(values[1])
    means = torch.stack([segment.mean() for segment in segments])
    assert found["kl_error"] == pytest.approx(float(means.std()) / 10**0.5)
    assert len(found["kl_histogram"]) == 49
    assert sum(found["kl_histogram"]) == len(values)


@pytest.mark.parametrize(
    ("value", "place"),
    [(0.0, 0), (-1e-9, 0), (9e-9, 0), (2e-8, 2), (1.0, 39), (99.0, 48), (1e5, 48)],
)
def test_a_divergence_is_counted_in_its_bin(value, place):
    values = torch.tensor([value], dtype=torch.float64)
    histogram = summarize([values], [values > 0])["kl_histogram"]
    assert histogram.index(1) == place
    assert summarize([values], [values > 0])["kl_error"] is None


def test_a_comparison_holds_the_losses_of_its_segments(compared):
    losses = torch.tensor(compared.model.losses).double()
    assert len(losses) == 3
    assert float(losses.mean().exp()) == pytest.approx(compared.model.perplexity)
    assert compared.model.data_sha256 == compared.reference.data_sha256


def test_the_command_line_keeps_what_it_prints(out, pico, text, capsys):
    words = [
        "eval",
        str(out),
        "--data",
        str(text),
        "--seq-len",
        "32",
        "--segments",
        "3",
    ]
    reference = ["--against", str(pico("gpt2")), "--keep", "--json", "-q"]
    app([*words, *reference], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    (kept,) = read_measurements(out)
    assert json.loads(json.dumps(kept.record)) == printed
    assert isinstance(kept.result, ComparisonRecord)
    assert kept.reference == str(pico("gpt2"))
    assert halve.verify(out).sound


def test_one_measurement_of_each_thing_is_kept(out, pico, compared):
    dense = str(pico("gpt2"))
    bench = BenchRecord("m", 1, {}, "cpu", 1, "torch", 1.0, (), {})
    for result, reference in (
        (compared, dense),
        (compared.model, None),
        (bench, None),
        (replace(compared, kl_mean=7.0), dense),
    ):
        keep_measurement(out, result, reference)
    kinds = {type(m.result): m.result for m in read_measurements(out)}
    assert len(kinds) == len(read_measurements(out)) == 3
    assert kinds[ComparisonRecord] == replace(compared, kl_mean=7.0)
    assert kinds[PerplexityRecord] == compared.model
    assert kinds[BenchRecord] == bench


def test_a_packed_model_does_not_inherit_them(out, compared, tmp_path):
    keep_measurement(out, compared.model)
    halve.pack(out, tmp_path / "packed")
    assert not (tmp_path / "packed" / MEASUREMENTS).exists()


def test_measurements_of_another_output_are_refused(out, compared, pico, tmp_path):
    keep_measurement(out, compared.model)
    other = tmp_path / "other"
    halve.prune(pico("gpt2"), other, solver="magnitude", sparsity="2:4")
    shutil.copy(out / MEASUREMENTS, other / MEASUREMENTS)
    with pytest.raises(CheckpointError, match="another output"):
        check_keepable(other)


@pytest.mark.parametrize("place", [10, -10, 0.5])
def test_damage_is_detected(place, out, compared):
    keep_measurement(out, compared.model)
    data = bytearray((out / MEASUREMENTS).read_bytes())
    data[int(place * len(data)) if place == 0.5 else place] ^= 1
    (out / MEASUREMENTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_measurements(out)


def test_only_outputs_keep_measurements(pico):
    with pytest.raises(HalveError, match=r"no halve\.json"):
        check_keepable(pico("gpt2"))
    with pytest.raises(HalveError, match="random model"):
        check_keepable(None)


@pytest.mark.parametrize(("peaks", "recorded"), [((5, 7), 7), ((7, 7), 0)])
def test_a_peak_of_before_the_run_is_not_recorded(
    peaks, recorded, pico, tmp_path, monkeypatch
):
    states = iter((peaks[0],) + (peaks[1],) * 9)
    for module in (prune_module, loop_module, system):
        monkeypatch.setattr(module, "peak_memory", lambda: next(states))
    record = halve.prune(pico("gpt2"), tmp_path / "out", solver="magnitude")
    assert record.bytes_peak == recorded


def test_a_run_records_its_model_machine_and_memory(pruned, pico):
    record = json.loads((pruned / "halve.json").read_text())
    assert record["model"]["name"] == str(pico("gpt2"))
    assert record["model"]["model_type"] == "gpt2"
    assert record["model"]["parameters"] == 370_432
    assert record["machine"]["device"] == "cpu"
    assert record["bytes_foreseen"] > 2**26
