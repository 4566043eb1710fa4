"""`halve bench` on a GPU: what it does there, done on the CPU."""

import time
from functools import partial

import pytest
import torch

import halve
from halve.cli.bench import _print_notes
from halve.errors import HalveError
from halve.measure import speed
from halve.measure.footprint import footprint
from halve.measure.random_models import _config, write_random_model
from halve.measure.speed import PACKED, TORCH, bench_cases, measure_speed
from halve.options import BenchOptions
from halve.patterns import parse_pattern
from halve.records import BenchRecord, Footprint, SpeedRecord
from halve.runtime import decode
from halve.runtime.cuda import decode as cuda_decode
from tests.tables import save_pico

INT8 = BenchOptions(device="cpu", activations="int8")


def wall_seconds(work, device):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the paths of a GPU; a forward pass is run again instead of replayed."""
    prepare = partial(cuda_decode.prepare, record=lambda run, device: run)
    monkeypatch.setattr(decode, "prepare", prepare)
    monkeypatch.setattr(speed, "gpu_seconds", wall_seconds)
    monkeypatch.setattr(speed, "on_gpu", lambda model: True)


def packed(pico, tmp_path, row):
    halve.prune(pico(row), tmp_path / row, solver="magnitude", packed=True)
    return tmp_path / row


@pytest.mark.parametrize(("row", "decoding"), [
    ("llama", "cuda graph"),
    ("opt", "cuda graph"),
    ("gptj", "transformers"),
    ("mpt", "transformers"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Tokens are decoded without CUDA graphs")
def test_dense_and_packed_are_timed(row, decoding, pico, tmp_path, as_on_a_gpu):
    records = measure_speed(packed(pico, tmp_path, row), bench_cases(8, 3, (1, 2)), 2)
    tests = [(TORCH, "pp8"), (PACKED, "pp8"), (TORCH, "tg3"), (PACKED, "tg3")]
    tests += [(TORCH, "tg3 x2"), (PACKED, "tg3 x2")]
    assert [(r.backend, r.test) for r in records] == tests
    assert [len(r.seconds) for r in records] == [2] * 6
    assert {r.decoding for r in records if r.test != "pp8"} == {decoding}
    dense, sparse = (r.weight_bytes for r in records[2:4])
    assert sparse < dense


def test_dense_layers_are_torchs_own(pico, tmp_path, as_on_a_gpu):
    model = halve.load(packed(pico, tmp_path, "llama"), device="cpu")
    backends = speed.Backends(model)
    kinds = {type(layer) for layer in backends.layers[TORCH].values()}
    assert kinds == {torch.nn.Linear}
    # The head is read for each token, too.
    assert backends.layers[PACKED]["lm_head"].weight is model.lm_head.weight


def test_a_model_that_is_unpacked_is_not_compared_with_itself(pico, as_on_a_gpu):
    with pytest.raises(HalveError, match="unpacked on this GPU"):
        measure_speed(pico("llama"), bench_cases(0, 3, (1,)), 1)


def test_8_bit_activations_are_refused(pico, as_on_a_gpu):
    with pytest.raises(HalveError, match="8-bit activations"):
        measure_speed(pico("llama"), bench_cases(0, 3, (1,)), 1, INT8)


def test_the_card_and_its_memory_are_named(capsys):
    result = SpeedRecord(TORCH, "tg3", 1, 3, (1.0,), 10, "cuda graph")
    record = BenchRecord(
        model="m",
        parameters=1,
        sizes={TORCH: 1},
        cpu="a CPU",
        threads=1,
        kernel="triton",
        bandwidth=3e12,
        results=(result,),
        footprints={"dense": Footprint(1, 2, 3, 16 * 2**30, 17 * 2**30)},
        gpu="NVIDIA H100",
    )
    _print_notes(record)
    said = capsys.readouterr().out
    assert "NVIDIA H100: 3000.0 GB/s copied" in said
    assert "decoded by: cuda graph" in said
    assert "GPU memory, dense: 16 GiB of weights, 17 GiB at the peak" in said


def test_a_footprint_on_the_cpu_has_no_gpu(tmp_path):
    measured = footprint(save_pico(tmp_path / "m", "llama"))
    assert measured.interpreter <= measured.loaded <= measured.run
    assert (measured.gpu_loaded, measured.gpu_peak) == (0, 0)


def test_the_random_8b_has_the_shape_of_llama_3():
    config = _config("llama", "8B")
    assert (config.num_key_value_heads, config.vocab_size) == (8, 128256)
    assert not config.tie_word_embeddings
    assert _config("llama", "7b").tie_word_embeddings


def test_a_random_model_is_written_from_any_device(tmp_path):
    pattern = parse_pattern("50%")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_random_model(tmp_path / name, "opt", "125m", pattern, device="cpu")
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
