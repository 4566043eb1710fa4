"""Laws of recovery, over families, dtypes, patterns, and dense and packed inputs."""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import halve
from halve.calibration import Corpus
from halve.checkpoint import Checkpoint
from halve.errors import HalveError, NumericalError
from halve.recovery import student
from halve.recovery.divergence import divergence_and_gradient
from halve.recovery.windows import split_text
from tests.conftest import PYTHON
from tests.interruptions import Stopped, digests, stop_at

OPTIONS: dict[str, Any] = {
    "samples": 6,
    "held_out": 2,
    "seq_len": 24,
    "steps": 4,
    "batch": 2,
    "learning_rate": 0.002,
    "device": "cpu",
}
# Row -> family, dtype, and options of pruning.
ROWS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "50%, float32": ("opt", torch.float32, {"sparsity": "50%"}),
    "2:4, bfloat16": ("llama", torch.bfloat16, {"sparsity": "2:4"}),
    "70%, float16": ("gpt2", torch.float16, {"sparsity": "70%"}),
    "experts": ("mixtral", torch.bfloat16, {"sparsity": "50%"}),
    "some dense": ("opt", torch.bfloat16, {"sparsity": "50%", "skip": ("fc1",)}),
}


@pytest.fixture(scope="module")
def pruned(pico, tmp_path_factory):
    """Return a function from a row to its dense and its pruned model."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(row: str) -> tuple[Path, Path]:
        if row not in made:
            family, dtype, options = ROWS[row]
            dense = pico(family, dtype=dtype)
            out = tmp_path_factory.mktemp("pruned") / "out"
            halve.prune(dense, out, solver="magnitude", **options)
            made[row] = dense, out
        return made[row]

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Return a short text: most of the time went into its tokens."""
    path = tmp_path_factory.mktemp("text") / "python.txt"
    path.write_bytes(lzma.decompress(PYTHON.read_bytes())[:40_000])
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint.read(checkpoint.tensors)


def matrices_of(folder: Path) -> set[str]:
    return {matrix.tensor for matrix in halve.inspect(folder).matrices}


@pytest.mark.parametrize(("peak", "recorded"), [(7, 7), (5, 0)])
def test_a_peak_of_before_is_not_recorded(
    peak, recorded, pruned, text, tmp_path, monkeypatch
):
    dense, out = pruned("50%, float32")
    monkeypatch.setattr("halve.recovery.recover.peak_memory", lambda: 5)
    monkeypatch.setattr("halve.system.peak_memory", lambda: peak)
    options: dict[str, Any] = OPTIONS | {"steps": 1, "calibration": str(text)}
    record = halve.recover(out, dense, tmp_path / "new", **options)
    assert record.bytes_peak == recorded


@pytest.mark.parametrize("row", ROWS)
def test_zeros_stay_and_the_model_is_never_worse(row, pruned, text, tmp_path):
    dense, model = pruned(row)
    out = tmp_path / "out"
    record = halve.recover(model, dense, out, calibration=str(text), **OPTIONS)
    assert record.after <= record.before
    assert halve.verify(out).sound
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        if name in matrices_of(model):
            assert torch.equal(after[name] == 0, weight == 0), name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed, "the learning rate of the tests suits all rows"
    assert not [name for name in changed if "embed" in name or "wte" in name]
    assert halve.RecoverRecord.from_json((out / "halve.json").read_text()) == record


@pytest.mark.parametrize("row", ["2:4, bfloat16", "experts"])
def test_a_packed_model_recovers_to_the_same_weights(row, pruned, text, tmp_path):
    dense, model = pruned(row)
    halve.pack(model, tmp_path / "packed")
    for source, out in ((model, "a"), (tmp_path / "packed", "b")):
        halve.recover(source, dense, tmp_path / out, calibration=str(text), **OPTIONS)
    assert halve.verify(tmp_path / "b").sound
    assert Checkpoint.open(tmp_path / "b").is_packed
    dense_out, packed_out = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    for name, weight in dense_out.items():
        assert torch.equal(packed_out[name], weight), name


def test_what_is_stopped_resumes_to_the_same_bytes(pruned, text, tmp_path):
    dense, model = pruned("2:4, bfloat16")
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.recover(model, dense, tmp_path / "whole", **options)
    for count in (1, 3, 4):
        out = tmp_path / f"out-{count}"
        with pytest.raises(Stopped):
            halve.recover(model, dense, out, progress=stop_at(count), **options)
        assert not out.exists()
        steps: list[Any] = []
        halve.recover(model, dense, out, progress=steps.append, **options)
        assert len(steps) == OPTIONS["steps"] - count + 1
        assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("row", ["50%, float32", "experts"])
def test_blocks_run_again_where_memory_is_short_to_the_same_bytes(
    row, pruned, text, tmp_path, monkeypatch
):
    """In each of 4 steps 2 blocks run forward and backward; judging runs none again."""
    again: list[int] = []
    monkeypatch.setattr(student, "checkpoint", counted(student.checkpoint, again))
    dense, model = pruned(row)
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    for free, calls in ((2**40, 0), (0, 8)):
        monkeypatch.setattr(student, "available_memory", lambda free=free: free)
        halve.recover(model, dense, tmp_path / str(free), **options)
        assert len(again) == calls
    assert digests(tmp_path / "0") == digests(tmp_path / str(2**40))


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """Return the function, which also notes each call."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        calls.append(len(calls))
        return function(*arguments, **keywords)

    return run


def test_steps_are_decided_once_by_the_time(pruned, text, tmp_path):
    dense, model = pruned("50%, float32")
    options: dict[str, Any] = OPTIONS | {
        "calibration": str(text),
        "steps": None,
        "minutes": 0.004,
    }
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        halve.recover(model, dense, out, progress=stop_at(1), **options)
    ledger = (tmp_path / "out.partial" / "ledger.jsonl").read_text()
    record = halve.recover(model, dense, out, **options)
    assert f'{{"count": {record.steps}}}' in ledger


def test_timing_steps_leaves_no_trace(pruned, text, tmp_path):
    dense, model = pruned("50%, float32")
    options: dict[str, Any] = OPTIONS | {"calibration": str(text), "steps": None}
    timed = halve.recover(model, dense, tmp_path / "a", minutes=0.004, **options)
    options["steps"] = timed.steps
    counted = halve.recover(model, dense, tmp_path / "b", **options)
    assert counted.states == timed.states
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_what_is_not_improved_comes_out_as_it_was(pruned, text, tmp_path):
    dense, model = pruned("2:4, bfloat16")
    options: dict[str, Any] = OPTIONS | {
        "calibration": str(text),
        "learning_rate": 3.0,
        "steps": 2,
    }
    with pytest.warns(halve.HalveWarning, match="weights of the input"):
        record = halve.recover(model, dense, tmp_path / "out", **options)
    assert record.best_step == 0
    assert record.after == record.before
    for name, weight in tensors_of(model).items():
        assert torch.equal(tensors_of(tmp_path / "out")[name], weight)


@pytest.mark.parametrize("packed", [False, True])
def test_quantized_matrices_keep_their_values(packed, pico, text, tmp_path):
    dense, model, out = pico("llama"), tmp_path / "model", tmp_path / "out"
    grid: dict[str, Any] = {"quantize": "int4", "packed": packed}
    halve.prune(dense, model, solver="magnitude", **grid)
    record = halve.recover(model, dense, out, calibration=str(text), **OPTIONS)
    assert halve.verify(out).sound
    before, after = tensors_of(model), tensors_of(out)
    assert set(record.unchanged) == matrices_of(model)
    for name in record.unchanged:
        assert torch.equal(after[name], before[name])
    assert any(not torch.equal(after[n], before[n]) for n in before if "norm" in n)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 7), (3, 5, 64)])
def test_the_gradient_is_that_of_autograd(shape):
    torch.manual_seed(0)
    logits = torch.randn(shape).requires_grad_(True)
    dense = 3 * torch.randn(shape)
    target = functional.kl_div(
        logits.log_softmax(-1),
        dense.log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    target.backward()
    assert logits.grad is not None
    total, gradient = divergence_and_gradient(logits.detach(), dense.clone())
    torch.testing.assert_close(total.float(), target.detach())
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 31, 64])
def test_held_out_text_is_not_trained_on(count):
    documents = [f"{number:02}" * 16 for number in range(count)]
    training, held_out = split_text(Corpus("name", documents, "\n"))
    together = [*training.documents, *held_out.documents]
    assert sorted("".join(together)) == sorted("".join(documents))
    assert len("".join(held_out.documents)) >= len("".join(documents)) / 32
    if count >= 16:
        assert not set(training.documents) & set(held_out.documents)
        assert list(training.documents[:2]) == documents[:2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"minutes": 1.0}, "Pass --steps or --minutes"),
    "rate": ({"learning_rate": 0.0}, "--lr"),
    "batch": ({"batch": 0}, "--batch"),
    "length": ({"seq_len": 1}, "--seq-len"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_wrong_options_are_refused(row, pruned, text, tmp_path):
    changes, remedy = REFUSED[row]
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)} | changes
    with pytest.raises(HalveError, match=remedy):
        dense, model = pruned("50%, float32")
        halve.recover(model, dense, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_other_vocabularies_are_refused(pruned, pico, text, tmp_path):
    _, model = pruned("50%, float32")
    other = pico("opt", vocab_size=4100)
    with pytest.raises(HalveError, match="vocabulary"):
        halve.recover(model, other, tmp_path / "out", calibration=str(text), **OPTIONS)


def test_damaged_weights_are_reported(pruned, text, tmp_path, monkeypatch):
    dense, model = pruned("50%, float32")
    options: dict[str, Any] = OPTIONS | {
        "calibration": str(text),
        "learning_rate": 1e30,
    }
    with pytest.raises(NumericalError, match="not finite"):
        halve.recover(model, dense, tmp_path / "out", **options)


def test_the_state_is_not_in_the_output(pruned, text, tmp_path):
    dense, model = pruned("50%, float32")
    out = tmp_path / "out"
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.recover(model, dense, out, **options)
    assert not list(out.glob("state*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {n for path in out.glob("*.safetensors") for n in load_file(path)}
    assert names == set(Checkpoint.open(model).tensors)


def test_a_report_tells_of_recovery(pruned, text, tmp_path):
    dense, model = pruned("2:4, bfloat16")
    options: dict[str, Any] = OPTIONS | {"calibration": str(text)}
    halve.recover(model, dense, tmp_path / "out", **options)
    halve.pack(tmp_path / "out", tmp_path / "packed")
    sources = {"out": "out-source", "packed": "packed-source-source"}
    for name, source in sources.items():
        page = halve.report(tmp_path / name).read_text()
        assert "held-out divergence" in page
        assert f"halve recover {source} --against" in page
        assert "--seq-len 24" in page
