"""What is done otherwise on a GPU, done on the CPU: the same bytes, the same errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halve
from halve.calibration_stats import GramMatrix
from halve.errors import HalveError, NumericalError
from halve.numerics.precision import matmul_precision
from halve.pruning import loop, prune_block, run
from halve.pruning.observe import collect
from halve.runtime import batch_size, hidden_states, oom_backoff, stream
from halve.runtime.batch_size import activation_nbytes, batch_tokens_within
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.hidden_states import SideCopies, pinned_nbytes, place_hidden
from halve.runtime.stream import Stream
from tests.integration.gpu_ways import (
    OPTIONS,
    check_later,
    copy_beside,
    opened,
    overlap_files,
)
from tests.interruptions import STOPPED, digests

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = ("magnitude", "sparsegpt", "refined", "allocated")


WAYS = {
    "checks at the end of a pass": check_later,
    "hidden states copied beside the work": copy_beside,
    "files read and written in threads": overlap_files,
}


@pytest.fixture
def prune(pico, text, tmp_path):
    def prune(row, name, family="llama", **options):
        rows: dict[str, dict[str, Any]] = STOPPED | {"auto": {}}
        asked: dict[str, Any] = OPTIONS | {"calibration": str(text)} | rows[row]
        halve.prune(pico(family), tmp_path / name, **(asked | options))
        return digests(tmp_path / name)

    return prune


@pytest.mark.parametrize("row", ROWS)
def test_every_way_ends_in_the_same_bytes(row, prune, monkeypatch):
    expected = prune(row, "expected")
    for way, enable in WAYS.items():
        with monkeypatch.context() as patch:
            enable(patch)
            assert prune(row, way) == expected, way
    for enable in WAYS.values():
        enable(monkeypatch)
    assert prune(row, "together") == expected


def spoil(patch, sample: int) -> None:
    """Make the hidden states of one sample infinite before the first block."""
    real = Stream.start.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def start(cls, *args):
        started = real(cls, *args)
        if sample < len(started.hidden):  # the dense model runs held-out samples alone
            started.hidden[sample, 5, 0] = float("inf")
        return started

    patch.setattr(Stream, "start", classmethod(start))


# Options, sample, and what is not finite: inputs that are summed or only held out, and
# outputs of a block whose inputs nobody looks at.
SPOILED = [
    ({"solver": "sparsegpt"}, 17, "inputs of model.layers.0"),
    ({"solver": "sparsegpt", "target_bits": 3.2, "group_size": 32}, 38, "inputs of"),
    ({"solver": "magnitude", "refine": True}, 17, "Block model.layers.0 outputs NaN"),
    ({"solver": "auto"}, 39, "Block model.layers.0 outputs NaN"),
]


@pytest.mark.parametrize(("options", "sample", "message"), SPOILED, ids=str)
def test_the_same_sample_is_named(options, sample, message, prune, monkeypatch):
    spoil(monkeypatch, sample)
    said = []
    for number, way in enumerate((None, check_later, copy_beside)):
        if way is not None:
            way(monkeypatch)
        with pytest.raises(NumericalError) as error:
            prune("magnitude", f"out-{number}", **options)
        said.append(str(error.value))
    assert said == [said[0]] * 3
    assert message in said[0]
    assert f"sample {sample}." in said[0]


@pytest.mark.parametrize("tokens", [64, 128, 320])
def test_a_pass_with_copies_beside_it_is_the_same(tokens, pico, monkeypatch):
    """For one batch, and for several of which the last one is smaller."""
    model = opened(pico("llama"), batch_tokens=tokens)
    windows = torch.arange(5 * 64).remainder(100).view(5, 64)
    streams = [Stream.start(model, windows, 2**30, held_out=1) for _ in range(2)]
    with model.block(0) as block:
        streams[0].advance(block, 0)
        copy_beside(monkeypatch)
        streams[1].advance(block, 0)
    assert torch.equal(streams[0].hidden, streams[1].hidden)
    assert streams[1]._copies is None


def test_copies_beside_hold_two_batches(monkeypatch):
    hidden = torch.arange(24.0).view(6, 2, 2)
    copies = SideCopies(hidden.clone(), CPU, 2)
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    copies.start(parts[0])
    copies.start(parts[1])
    for part, following in zip(parts, [parts[2], None, None], strict=True):
        states = copies.take(part)
        assert states is not None
        assert torch.equal(states, hidden[part])
        assert copies.take(part) is None
        copies.put(part, -states)
        if following is not None:
            copies.start(following)
    copies.finish()
    assert torch.equal(copies._hidden[:5], -hidden[:5])
    assert torch.equal(copies._hidden[5], hidden[5])


def test_tuning_takes_as_many_steps_in_large_batches(pico):
    windows = torch.zeros(40, 64, dtype=torch.int64)
    small = Stream.start(opened(pico("llama")), windows, 2**30, held_out=4)
    large = opened(pico("llama"), batch_tokens=batch_size.CUDA_BATCH_TOKENS)
    stream_of_large = Stream.start(large, windows, 2**30, held_out=4)
    assert list(stream_of_large.steps()) == list(small.steps()) == list(small.batches())
    assert len(list(stream_of_large.batches())) == 2
    with large.block(0) as block:
        for part in stream_of_large.steps():
            stream_of_large.run(block, 0, part)


def test_large_batches_give_nearly_the_same_model(pico, text, tmp_path, monkeypatch):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | STOPPED["refined"]
    halve.prune(pico("llama"), tmp_path / "small", **options)
    real = BlockwiseModel.open.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def open_with_large_batches(cls, *args):
        return replace(real(cls, *args), batch_tokens=16384)

    monkeypatch.setattr(BlockwiseModel, "open", classmethod(open_with_large_batches))
    halve.prune(pico("llama"), tmp_path / "large", **options)
    small, large = (
        {
            name: tensor == 0
            for path in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for folder in ("small", "large")
    )
    same = [float((zeros == large[n]).double().mean()) for n, zeros in small.items()]
    assert min(same) > 0.9


@pytest.mark.parametrize(
    ("gib", "width", "inner", "tokens"),
    [
        (79, 12288, 49152, 16384),  # OPT-175B
        (79, 12288, 96 * 2048, 4096),  # with all scores in memory
        (24, 4096, 14336, 16384),  # Llama 8B
        (8, 4096, 14336, 4096),
        (1, 12288, 49152, 1024),
    ],
)
def test_batches_fit_the_gpu(gib, width, inner, tokens):
    token_nbytes = activation_nbytes(1, width, inner)
    assert batch_tokens_within(gib * 2**30, token_nbytes) == tokens


def test_hidden_states_go_where_they_fit(pico, monkeypatch):
    """On the GPU if the reserve stays free, else page-locked within the budget."""
    asked = []

    def empty(shape, **options):
        asked.append(options)
        return torch.zeros(shape)

    shape = (1, 10, 6)  # 240 bytes, for which 256 are page-locked
    model = opened(pico("llama"), device=CUDA)
    monkeypatch.setattr(hidden_states.torch, "empty", empty)
    monkeypatch.setattr(hidden_states, "free_gpu_nbytes", lambda device: 1000)
    for reserve, budget in ((760, 0), (761, 256), (None, 256)):
        place_hidden(replace(model, reserve=reserve), shape, budget)
    assert asked == [{"device": CUDA}, {"pin_memory": True}, {"pin_memory": True}]
    monkeypatch.undo()
    assert not place_hidden(replace(model, reserve=None), shape, 255).is_pinned()


def test_page_locked_memory_is_allocated_in_powers_of_two():
    sizes = {0: 1, 1: 1, 2: 2, 3: 4, 1024: 1024, 1025: 2048}
    assert {size: pinned_nbytes(size) for size in sizes} == sizes


def test_hidden_states_leave_a_gpu_whose_memory_was_exhausted(pico):
    model = opened(pico("llama"), reserve=1)
    with pytest.warns(halve.HalveWarning, match="retrying with 512 tokens"):
        assert oom_backoff._with_half_the_batch(model).reserve is None


def test_precision_is_lowered_in_blocks_alone(prune, monkeypatch):
    """And recorded with the options that determine the output."""
    within, outside = [], []
    monkeypatch.setattr(
        stream,
        "matmul_precision",
        lambda name, device: matmul_precision(name, CUDA),
    )
    real = Stream._load

    def load(self, part):
        within.append(torch.get_float32_matmul_precision())
        return real(self, part)

    monkeypatch.setattr(Stream, "_load", load)
    real_solve = prune_block.solve_stage

    def solve(*args):
        outside.append(torch.get_float32_matmul_precision())
        return real_solve(*args)

    monkeypatch.setattr(prune_block, "solve_stage", solve)
    monkeypatch.setattr("halve.pruning.plan._check_precision", lambda options: None)
    prune("refined", "out", matmul_precision="high")
    assert set(within) == {"high"}
    assert set(outside) == {"highest"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_would_do_nothing_is_refused(prune, tmp_path):
    with pytest.raises(HalveError, match="--matmul-precision"):
        prune("sparsegpt", "out", matmul_precision="high")
    with pytest.raises(HalveError, match="highest, high"):
        prune("sparsegpt", "out", matmul_precision="medium")
    prune("magnitude", "out", matmul_precision="highest")
    record = (tmp_path / "out" / "halve.json").read_text()
    assert '"matmul_precision": "highest"' in record


# What follows runs on a GPU alone.

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no NVIDIA GPU"
)


def keep_on_host(patch):
    """Hidden states are page-locked, and copied beside the work."""
    patch.setattr(hidden_states, "_fits_gpu", lambda model, nbytes: False)


def map_files(patch):
    """Hidden states are in memory-mapped files."""
    keep_on_host(patch)
    patch.setattr(hidden_states, "pinned_nbytes", lambda nbytes: 2**62)


def read_in_turn(patch):
    for module in (run, loop):
        patch.setattr(module, "overlaps_files", lambda run: False)


def check_at_once(patch):
    for module in (stream, collect):
        patch.setattr(module, "checks_later", lambda device: False)


def add_by_torch(patch):
    patch.setattr("halve.numerics.compensated_sum._fused", lambda device: None)


WAYS_OF_GPU = (keep_on_host, map_files, read_in_turn, check_at_once, add_by_torch)


# Without gradients, which attention on a GPU does not sum in a fixed order.
@needs_gpu
@pytest.mark.parametrize("row", ["sparsegpt", "allocated", "auto"])
def test_every_way_on_a_gpu_ends_in_the_same_bytes(row, prune, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batch_size, "CUDA_BATCH_TOKENS", 512)  # several batches
        expected = prune(row, "expected", device="cuda")
        for way in WAYS_OF_GPU:
            with monkeypatch.context() as inner:
                way(inner)
                assert prune(row, way.__name__, device="cuda") == expected, way


@needs_gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_masks_of_a_gpu_are_those_of_the_cpu(precision, prune, tmp_path):
    prune("sparsegpt", "cpu")
    prune("sparsegpt", "gpu", device="cuda", matmul_precision=precision)
    for path in (tmp_path / "cpu").glob("*.safetensors"):
        there = load_file(tmp_path / "gpu" / path.name)
        for name, tensor in load_file(path).items():
            same = (tensor == 0) == (there[name] == 0)
            assert float(same.double().mean()) > 0.97, name


@needs_gpu
@pytest.mark.parametrize("sample", [3, 17])
def test_a_gpu_names_the_sample(sample, prune, monkeypatch):
    spoil(monkeypatch, sample)
    with pytest.raises(NumericalError, match=f"sample {sample}\\."):
        prune("sparsegpt", "out", device="cuda")


@needs_gpu
def test_a_gram_matrix_on_a_gpu_is_that_of_float64(monkeypatch):
    """For tiles that are smaller than the matrix, joined and ragged."""
    inputs = torch.randn(3000, 9000, device="cuda")
    gram = GramMatrix(9000, inputs.device)
    for batch in inputs.split(1000):
        gram.add(batch)
    exact = inputs.double().T @ inputs.double()
    error = (gram.take().double() - exact).abs().max() / exact.diagonal().max()
    assert float(error) < 1e-5
