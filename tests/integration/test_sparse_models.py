"""A packed checkpoint is a transformers model that runs packed."""

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import halve
from halve.errors import CheckpointError, UnsupportedModelError
from halve.runtime.cpu import dense_linear as layers
from halve.runtime.cpu.dense_linear import DenseLinear
from halve.runtime.cpu.operators import dense_linear
from halve.runtime.cpu.packed_linear import PackedLinear
from tests.separate_process import start_halve
from tests.tables import BUNDLED, files_of_at_most

FAMILIES = ("opt", "gpt2", "bloom", "llama", "gpt_neox", "phi3", "falcon", "gemma2")
PROMPT = "def main("


@pytest.fixture(scope="module")
def both(pico, tmp_path_factory):
    """Return a function that returns a family's pruned model, dense and packed."""
    made = {}

    def folders(row, **options):
        key = f"{row}-{options}"
        if key not in made:
            home = tmp_path_factory.mktemp("sparse")
            halve.prune(pico(row, **options), home / "dense", solver="magnitude")
            halve.pack(home / "dense", home / "packed")
            made[key] = home / "dense", home / "packed"
        return made[key]

    return folders


def load(folder, **options) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def some_ids(length=12, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 4096, (batch, length), generator=generator)


@pytest.mark.parametrize("row", FAMILIES)
@torch.no_grad()
def test_packed_model_computes_what_the_dense_one_does(row, both):
    dense, packed = (load(folder) for folder in both(row))
    layers = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(layers) >= 8
    for ids in (some_ids(1, 1), some_ids(5, 3), some_ids(40, 2)):
        expected = dense(ids).logits
        assert torch.allclose(packed(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", FAMILIES)
def test_saved_again_it_is_the_same_tensor_for_tensor(row, both, tmp_path):
    model = load(both(row, dtype=torch.bfloat16)[1])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert halve.inspect(tmp_path).matrices[0].packed
    assert load_file(tmp_path / "model.safetensors").keys() == {
        name
        for path in both(row, dtype=torch.bfloat16)[1].glob("*.safetensors")
        for name in load_file(path)
    }


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    home = tmp_path_factory.mktemp("bundled")
    halve.prune(BUNDLED, home / "dense", sparsity="2:4", solver="magnitude")
    halve.pack(home / "dense", home / "packed")
    return home


def test_greedy_text_of_the_bundled_model_is_the_dense_models(bundled):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    texts = [
        load(bundled / kind, dtype=torch.float32).generate(
            **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False
        )
        for kind in ("dense", "packed")
    ]
    assert texts[0].shape[1] == inputs["input_ids"].shape[1] + 64
    assert torch.equal(*texts)


@torch.no_grad()
def test_bfloat16_logits_are_as_close_to_float32_as_torchs(bundled):
    ids = some_ids(100, 1)
    exact = load(bundled / "dense", dtype=torch.float32)(ids).logits
    for length in (100, 20, 1):
        part = ids[:, :length]
        dense = load(bundled / "dense")(part).logits.float() - exact[:, :length]
        packed = load(bundled / "packed")(part).logits.float() - exact[:, :length]
        assert packed.norm() <= 1.001 * dense.norm()


def test_pipeline_and_halve_generate_return_the_same(bundled):
    writer = pipeline("text-generation", model=str(bundled / "packed"))
    text = writer(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text == halve.generate(bundled / "packed", PROMPT, max_new_tokens=12)


@torch.no_grad()
def test_compiles_whole(both):
    model = load(both("llama")[1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (some_ids(1, 1), some_ids(9, 2)):
        assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-5)


def test_loaded_in_another_dtype_it_is_converted(both):
    _, packed = both("llama", dtype=torch.bfloat16)
    model = load(packed, dtype=torch.float32)
    dense = load(both("llama", dtype=torch.bfloat16)[0], dtype=torch.float32)
    ids = some_ids()
    assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_that_stay_dense_multiply_a_few_rows_with_halves_kernel(
    both, monkeypatch
):
    model = load(both("llama")[1])
    assert isinstance(model.lm_head, DenseLinear)
    assert "lm_head.weight" in dict(model.named_parameters(remove_duplicate=False))
    rows = []

    def recording(x, *operands):
        rows.append(x.shape[-2])
        return dense_linear(x, *operands)

    monkeypatch.setattr(layers, "dense_linear", recording)
    for count in (1, 8, 9):
        x = torch.randn(1, count, 64)
        plain = torch.nn.functional.linear(x, model.lm_head.weight)
        assert torch.allclose(model.lm_head(x), plain, rtol=1e-4, atol=1e-5)
    assert rows == [1, 8]


@pytest.mark.parametrize("length", [1, 3, 60])
@pytest.mark.parametrize("row", ["opt", "llama", "gpt2"])
def test_gradients_pass_through_but_not_to_packed_weights(row, length, both):
    """Everything that is not packed can be trained, as in the dense model."""
    dense, packed = (load(folder) for folder in both(row))
    ids = some_ids(length, 1)
    for model in (dense, packed):
        model(ids).logits.square().mean().backward()
    expected = {name: p.grad for name, p in dense.named_parameters()}
    sparse = {n for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    for name, parameter in packed.named_parameters():
        if name.removesuffix(".weight") in sparse:
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("length", [1, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_gradients_works(length, dtype, both):
    dense, packed = (load(folder) for folder in both("llama", dtype=dtype))
    ids = some_ids(length, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = packed(ids).logits, dense(ids).logits
    assert torch.allclose(logits.float(), expected.float(), atol=0.05)
    assert packed(ids).logits.shape == expected.shape


def test_operands_that_do_not_fit_raise_as_in_torch(both):
    model = load(both("opt", dtype=torch.bfloat16)[1])
    layer = model.model.decoder.layers[0].fc1
    x = torch.randn(1, 1, 64).bfloat16()
    for wrong in (torch.zeros(1).bfloat16(), torch.zeros(128)):
        layer.bias = torch.nn.Parameter(wrong)
        with pytest.raises(RuntimeError, match="bias"), torch.no_grad():
            layer(x)
    with pytest.raises(RuntimeError), torch.no_grad():
        model.lm_head(torch.randn(4, 32).bfloat16())


def test_a_single_file_counts_before_an_index(both, tmp_path):
    """As in transformers, which leaves a stale index behind when it saves."""
    folder = tmp_path / "again"
    with files_of_at_most(0):
        halve.prune(both("llama")[0], folder, solver="magnitude")
    model = load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    sparsities = {m.tensor: m.sparsity for m in halve.inspect(folder).matrices}
    assert sparsities["model.layers.0.mlp.up_proj.weight"] == 1


def test_packed_files_without_an_entry_in_the_config_are_rejected(both, tmp_path):
    folder = shutil.copytree(both("llama")[1], tmp_path / "undeclared")
    shutil.copy(both("llama")[0] / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match="no quantization_config"):
        halve.generate(folder, PROMPT)


@pytest.mark.parametrize("row", ["llama", "gpt2"])
@torch.no_grad()
def test_dequantized_it_is_the_dense_model(row, both, tmp_path):
    dense, model = load(both(row)[0]), load(both(row)[1])
    model.dequantize()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path)
    assert not any(m.packed for m in halve.inspect(tmp_path).matrices)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    ids = some_ids()
    assert torch.equal(load(tmp_path)(ids).logits, dense(ids).logits)


ORDERS = [
    "import halve, transformers",
    "import transformers, halve",
    "import transformers.quantizers, halve",
    "import halve.errors, transformers",
    "import halve, importlib.util as u; u.find_spec('transformers.quantizers')",
]
# What transformers imports takes longest, and is imported once for all orders.
IN_EVERY_ORDER = """
import os
import sys
import scipy.optimize
import torch._dynamo
import torch.distributed.tensor

assert not {"halve", "transformers"} & set(sys.modules)
for order in sys.argv[2:]:
    if os.fork() == 0:
        exec(order)
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        packed = sum("BitmaskLinear" in type(m).__name__ for m in model.modules())
        print(packed, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, order
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_import_order_does_not_matter(both):
    done = subprocess.run(
        [sys.executable, "-c", IN_EVERY_ORDER, both("opt")[1], *ORDERS],
        # Else torch imports Halve before everything else.
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12"] * len(ORDERS)


def test_importing_halve_does_not_import_torch():
    code = "import halve, sys; print('torch' in sys.modules, len(sys.modules) < 300)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_without_kernels_it_generates_the_same_and_warns(bundled, tmp_path):
    command = ["generate", bundled / "packed", PROMPT, "--max-new-tokens", "8"]
    runs = [
        start_halve(tmp_path / f"{kernel} ", command, {"HALVE_KERNEL": kernel}).finish()
        for kernel in ("", "torch")
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stdout == runs[1].stdout
    assert "Warning" not in runs[0].stderr
    assert runs[1].stderr.count("without Halve's kernels (HALVE_KERNEL is torch)") == 1


def corrupt(folder, out, edit):
    """Copy a packed model and let `edit` change the tensors of its last file."""
    shutil.copytree(folder, out)
    path = sorted(out.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    edit(tensors, next(name for name in tensors if name.endswith("fc1.weight")))
    save_file(tensors, path, {"format": "pt"})
    return out


def _bit(tensors, name):
    mask = tensors[name + "_mask"].view(torch.int64)
    mask[3, 0] ^= 1


def _values(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def _rows(tensors, name):
    tensors[name + "_mask"] = tensors[name + "_mask"][:-1].clone()


def _part(tensors, name):
    del tensors[name + "_offsets"]


@pytest.mark.parametrize("edit", [_bit, _values, _rows, _part])
def test_an_inconsistent_file_is_rejected_before_a_kernel_runs(edit, both, tmp_path):
    folder = corrupt(both("opt")[1], tmp_path / "corrupt", edit)
    with pytest.raises(CheckpointError, match=r"fc1\.weight"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"fc1\.weight"):
        halve.load(folder)


def test_a_later_version_is_rejected_with_the_release_that_is_needed(both, tmp_path):
    folder = shutil.copytree(both("opt")[1], tmp_path / "later")
    config = (folder / "config.json").read_text()
    config = config.replace('"version": 1', '"version": 9').replace("0.1", "7.0")
    (folder / "config.json").write_text(config)
    for loader in (load, halve.load):
        with pytest.raises(UnsupportedModelError, match=r"Install Halve 7\.0 or newer"):
            loader(folder)
