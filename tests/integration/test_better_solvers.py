"""Candidates, order, block reconstruction and quantization in whole runs."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halve
from halve.calibration_stats import GramMatrix
from halve.errors import UnsupportedModelError
from halve.layout import PlannedBlock
from halve.options import PruneOptions
from halve.patterns import parse_pattern
from halve.pruning.observe.activation_cache import cache_dense_inputs
from halve.pruning.observe.block_state import BlockState, Streams
from halve.pruning.observe.collect import collect
from halve.pruning.observe.input_groups import stages
from halve.pruning.plan import make_plan
from halve.pruning.tune import block_reconstruction
from halve.pruning.tune.block_reconstruction import _Tuning
from halve.runtime.blockwise_model import BlockwiseModel
from halve.runtime.stream import Stream
from tests.interruptions import digests

OPTIONS: dict[str, Any] = {"samples": 16, "seq_len": 64, "device": "cpu"}
ROWS = ("opt", "gpt2", "llama", "gptj", "falcon")
over_rows = pytest.mark.parametrize("row", ROWS)


def tensors(folder):
    """Return all tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def matrices(record):
    """Return the records of all matrices."""
    return [m for block in record.blocks for m in block.matrices]


@pytest.mark.parametrize(
    ("row", "pattern"),
    [
        *((row, "50%") for row in ROWS),
        (ROWS[0], "2:4"),
        *(pytest.param(row, "2:4", marks=pytest.mark.slow) for row in ROWS[1:]),
    ],
)
def test_refining_never_raises_the_held_out_error_and_keeps_masks(
    row, pattern, pico, text, tmp_path
):
    # With a third of the windows, tuning improved nothing for some models and CPUs.
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "sparsity": pattern}
    options |= {"samples": 48}
    plain = halve.prune(pico(row), tmp_path / "plain", refine=False, **options)
    refined = halve.prune(
        pico(row), tmp_path / "refined", refine=True, epochs=12, **options
    )
    assert all(block.refined is None for block in plain.blocks)
    for block in refined.blocks:
        assert block.refined is not None
        assert block.refined[1] <= block.refined[0]
    # Otherwise tuning that does nothing would pass.
    assert any(b.refined[1] < b.refined[0] for b in refined.blocks if b.refined)
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "refined")
    for matrix in refined.blocks[0].matrices:  # later blocks get other inputs
        pruned = before[matrix.tensor] == 0
        assert torch.equal(after[matrix.tensor] == 0, pruned), matrix.tensor
        assert not after[matrix.tensor][pruned].signbit().any(), matrix.tensor
    # To the weight, whatever tuning did.
    for matrix, untuned in zip(refined.all_matrices, plain.all_matrices, strict=True):
        assert matrix.sparsity == untuned.sparsity
    weights = sum(matrix.rows * matrix.columns for matrix in refined.all_matrices)
    zeros = sum(block.zeros for block in refined.blocks)
    assert zeros == parse_pattern(pattern).count(weights)


def test_refined_biases_and_norms_are_stored(pico, text, tmp_path):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "epochs": 12}
    halve.prune(pico("opt"), tmp_path / "out", refine=True, **options)
    before, after = tensors(pico("opt")), tensors(tmp_path / "out")
    for kind in ("fc1.bias", "fc2.bias", "final_layer_norm.bias", "out_proj.bias"):
        moved = [n for n in before if n.endswith(kind) and ".layers." in n]
        assert any(not torch.equal(before[n], after[n]) for n in moved), kind


@pytest.mark.parametrize("solver", ["auto", "admm"])
def test_order_is_the_default_where_it_measures_better(solver, pico, text, tmp_path):
    """The first group gets the same inputs in either case; later groups do not."""
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "solver": solver}
    found = {}
    for name, sequential in (("default", None), ("on", True), ("off", False)):
        halve.prune(pico("opt"), tmp_path / name, sequential=sequential, **options)
        found[name] = tensors(tmp_path / name)
    name = "model.decoder.layers.0.{}.weight"
    for tensor, same in (("self_attn.q_proj", True), ("fc2", False)):
        path = name.format(tensor)
        assert torch.equal(found["default"][path], found["on"][path])
        assert torch.equal(found["on"][path], found["off"][path]) == same


@pytest.mark.parametrize(("solver", "default"), [("admm", 1), ("sparsegpt", 0)])
def test_the_ridge_reaches_solvers(solver, default, pico, text, tmp_path):
    """In whole runs, and what is left out is the solver's own."""
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "solver": solver}
    found = {}
    for name, ridge in (("left out", None), ("0", 0.0), ("1", 1.0)):
        halve.prune(pico("opt"), tmp_path / name, ridge=ridge, **options)
        found[name] = digests(tmp_path / name)
    assert found["0"] != found["1"]
    assert found["left out"] == found[str(default)]


@over_rows
def test_a_stage_ends_with_a_group_that_feeds_the_next(row, pico):
    """All do, but for the attention's output, which is added to the residual stream."""
    model = BlockwiseModel.open(pico(row), "cpu")
    stream = Stream.start(model, torch.arange(3, 35)[None], budget=2**30)
    planned = make_plan(pico(row), PruneOptions()).layout.blocks[0]
    with torch.no_grad(), model.block(0) as block:
        state = BlockState(block, planned, Streams(stream))
        groups = state.groups()
        found = stages(groups, state.width)
    assert [group for stage in found for group in stage] == groups
    if len(groups) == 3:  # attention and feed-forward side by side
        assert [len(stage) for stage in found] == [1, 2]
    else:
        assert [len(stage) for stage in found] == [1, 2, 1]


def test_statistics_are_of_windows_that_are_not_held_out(pico):
    model = BlockwiseModel.open(pico("llama"), "cpu")
    ids = torch.randint(3, 4096, (6, 32), generator=torch.Generator().manual_seed(0))
    stream = Stream.start(model, ids, budget=2**30, held_out=2)
    planned = make_plan(pico("llama"), PruneOptions()).layout.blocks[0]
    with torch.no_grad(), model.block(0) as block:
        state = BlockState(block, planned, Streams(stream, stream.fork(2**30)))
        groups = state.groups()
        reference = cache_dense_inputs(state, groups, 2**30, None)
        path = "self_attn.v_proj.weight"
        state.exchange(path, block.get_parameter(path) * 0.5)
        after = [g for g in groups if g.leader == "self_attn.o_proj"]
        (group_inputs,) = collect(state, after, GramMatrix, reference)
        seen: list[torch.Tensor] = []
        for part in stream.batches():
            state.each_input(part, after, lambda _, inputs: seen.append(inputs))
        weight = block.get_parameter("self_attn.o_proj.weight").data
    inputs = torch.cat(seen)
    dense = reference.inputs("self_attn.o_proj", 0, slice(0, 6))
    x, other = inputs[: 4 * 32], dense[: 4 * 32]
    assert group_inputs.drift is not None
    assert isinstance(group_inputs.statistic, GramMatrix)
    for found, expected in (
        (group_inputs.statistic.take(), x.T @ x),
        (group_inputs.drift.drift(0), weight @ (other - x).T @ x),
    ):
        assert float((found - expected).norm()) <= 1e-3 * float(expected.norm()) > 0
    held_out = torch.cat([pair[0] for pair in group_inputs.held_out.pairs])
    assert torch.equal(held_out, inputs[4 * 32 :])


@over_rows
def test_tuning_changes_nothing_outside_the_blocks(row, pico, text, tmp_path):
    halve.prune(
        pico(row), tmp_path / "out", calibration=str(text), refine=True, **OPTIONS
    )
    before, after = tensors(pico(row)), tensors(tmp_path / "out")
    plan = make_plan(pico(row), PruneOptions())
    blocks = {block.shard for block in plan.layout.blocks}
    for file, names in plan.layout.shards.items():
        if file not in blocks:
            assert all(torch.equal(before[name], after[name]) for name in names)


def test_the_record_has_the_selected_candidate_and_the_runner_up(pico, text, tmp_path):
    record = halve.prune(
        pico("llama"), tmp_path / "out", calibration=str(text), **OPTIONS
    )
    for matrix in matrices(record):
        assert matrix.solver in ("admm", "wanda --refit")
        assert matrix.held_out is not None
        assert matrix.runner_up is not None
        assert 0 < matrix.held_out <= matrix.runner_up


def test_one_solver_needs_no_held_out_windows(pico, text, tmp_path):
    record = halve.prune(
        pico("llama"),
        tmp_path / "out",
        calibration=str(text),
        solver="sparsegpt",
        **OPTIONS,
    )
    assert all(m.held_out is None and m.solver == "sparsegpt" for m in matrices(record))


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_same_seed_same_bytes(quantize, pico, text, tmp_path):
    options: dict[str, Any] = OPTIONS | {
        "calibration": str(text),
        "refine": True,
        "quantize": quantize,
    }
    for name in ("one", "two"):
        halve.prune(pico("llama"), tmp_path / name, **options)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_disk_or_the_memory_makes_no_difference(pico, text, tmp_path):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.prune(pico("opt"), tmp_path / "memory", **options)
    halve.prune(pico("opt"), tmp_path / "disk", activation_memory=0, **options)
    assert digests(tmp_path / "memory") == digests(tmp_path / "disk")


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_every_solver_can_be_corrected_and_refined(solver, pico, text, tmp_path):
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "solver": solver}
    record = halve.prune(
        pico("opt"), tmp_path / "out", sequential=True, refine=True, **options
    )
    assert record.sparsity == 0.5


@over_rows
def test_cached_dense_inputs_are_those_of_the_dense_model(row, pico):
    model = BlockwiseModel.open(pico(row), "cpu")
    ids = torch.randint(3, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    dense = Stream.start(model, ids, budget=2**30)
    planned: PlannedBlock = make_plan(pico(row), PruneOptions()).layout.blocks[0]
    expected: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), model.block(0) as block:
        state = BlockState(block, planned, Streams(dense.fork(2**30), dense))
        groups = state.groups()
        reference = cache_dense_inputs(state, groups, 2**30, None)
        for part in state.stream.batches():
            state.each_input(
                part, groups, lambda path, x: expected.setdefault(path, []).append(x)
            )
    for group in groups:
        found = reference.inputs(group.leader, 0, slice(0, 4))
        assert torch.equal(found, torch.cat(expected[group.leader]))
        with pytest.raises(UnsupportedModelError, match=r"with 31 inputs for 32 tok"):
            reference.put(group.leader, 0, slice(1, 2), found[:31])


@pytest.mark.parametrize("row", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [
    {"quantize": "int4"},
    {"quantize": "int3", "refine": True, "epochs": 2},
    {"quantize": "int2", "sparsity": "2:4", "symmetric": False},
    {"quantize": "int8", "sparsity": 0, "solver": "magnitude"},
    {"quantize": "int3", "sparsity": "0%"},
    {"quantize": "int4", "solver": "sparsegpt", "group_size": 24},
])  # fmt: skip
def test_quantized_values_lie_on_a_grid(row, options, pico, text, tmp_path):
    folder = pico(row, dtype=torch.bfloat16)
    chosen: dict[str, Any] = OPTIONS | {"calibration": str(text)} | options
    record = halve.prune(folder, tmp_path / "out", **chosen)
    found = tensors(tmp_path / "out")
    bits = int(str(options["quantize"])[-1])
    for matrix in matrices(record):
        assert matrix.grid is not None
        assert matrix.grid["bits"] == bits
        scales = 16 if matrix.grid["symmetric"] else 16 + bits
        codes = min(bits, 1 + (1 - matrix.sparsity) * bits)
        expected = codes + scales / matrix.grid["group_size"]
        assert matrix.bits == pytest.approx(expected)
        stored = found[matrix.tensor]
        rows = stored.T if row == "gpt2" else stored
        for group in rows.split(matrix.grid["group_size"], dim=1):
            assert max(len(values.unique()) for values in group) <= 2**bits
    assert record.bits is not None
    evaluated = halve.perplexity(
        tmp_path / "out", data=str(text), seq_len=32, segments=16
    )
    assert evaluated.perplexity > 1


def test_target_bits_are_not_exceeded(pico, text, tmp_path):
    record = halve.prune(
        pico("llama"),
        tmp_path / "out",
        calibration=str(text),
        target_bits=3.3,
        solver="admm",
        **OPTIONS,
    )
    assert record.bits is not None
    assert record.bits <= 3.3 + 1e-3
    assert record.mix is not None
    assert record.mix.bits <= 3.3 + 1e-9  # packed, a row of codes ends in a whole byte


@pytest.mark.parametrize(("options", "message"), [
    ({"target_bits": 3.1, "quantize": "int4"}, "target_bits selects the sparsity"),
    ({"target_bits": 3.1, "sparsity": "2:4"}, "target_bits selects the sparsity"),
    ({"target_bits": 0.5}, "No grid"),
    ({"quantize": "int5"}, "no quantize 'int5'"),
    ({"quantize": "float8"}, "no quantize 'float8'"),
    ({"quantize": "int4", "group_size": 0}, "not positive"),
    ({"group_size": 64}, "nothing is quantized"),
    ({"symmetric": False}, "nothing is quantized"),
    ({"quantize": "int8", "symmetric": False}, "significant bits, too few"),
    ({"sparsity": "0%"}, "is not a sparsity"),
    ({"samples": 1}, "none is left"),
    ({"epochs": 0, "refine": True}, "not positive"),
    ({"solver": "best"}, "no solver 'best'"),
])  # fmt: skip
def test_invalid_options_are_refused(options, message, pico, text, tmp_path):
    folder = pico("llama", dtype=torch.bfloat16)
    chosen: dict[str, Any] = OPTIONS | {"calibration": str(text)} | options
    with pytest.raises(halve.HalveError, match=message):
        halve.prune(folder, tmp_path / "out", **chosen)
    assert not (tmp_path / "out").exists()


def test_steps_that_are_too_large_leave_no_trace(pico, text, tmp_path, monkeypatch):
    """A block that they make worse begins again, and ends as if they had not been."""
    # Several steps an epoch: the first of all does nothing, as the rate rises from 0.
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "epochs": 2}
    options |= {"samples": 64}
    real, epochs = _Tuning.epoch, []

    def epoch(tuning):
        epochs.append(1)
        real(tuning)

    monkeypatch.setattr(_Tuning, "epoch", epoch)
    found = []
    for number, rates in enumerate(((0.01,), (100.0, 1e20, 0.01))):
        monkeypatch.setattr(block_reconstruction, "_RATES", rates)
        out = tmp_path / str(number)
        record = halve.prune(pico("llama"), out, refine=True, **options)
        found.append((digests(out), [block.refined for block in record.blocks]))
    assert found[0] == found[1]
    assert all(after < before for before, after in found[0][1])
    blocks = len(found[0][1])
    # One epoch shows that steps are too large.
    assert len(epochs) == blocks * 2 + blocks * (1 + 1 + 2)


def test_tuning_stores_its_best_epoch(pico, text, tmp_path, monkeypatch):
    """In float32 nothing is rounded; the stored values must be copies all the same."""
    errors = iter([1.0, 0.5, 0.9, 0.9] * 2)  # of two blocks; the first epoch is best
    kept: list[dict[str, torch.Tensor]] = []
    real = _Tuning.remember_best

    def keep(tuning):
        real(tuning)
        kept.append({path: value.clone() for path, value in tuning.best.items()})

    monkeypatch.setattr(_Tuning, "held_out_error", lambda _: next(errors))
    monkeypatch.setattr(_Tuning, "remember_best", keep)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "epochs": 3}
    halve.prune(pico("llama"), tmp_path / "out", refine=True, **options)
    stored = tensors(tmp_path / "out")
    for index, best in enumerate(kept):
        for path, value in best.items():
            assert torch.equal(stored[f"model.layers.{index}.{path}"], value), path
