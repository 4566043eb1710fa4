"""The kernels of packed layers on GPUs against plain products, in Triton's interpreter.

There kernels run on tensors of the CPU, and so do layers for which the CPU is declared
to be a GPU. The interpreter must be chosen before triton is imported (`conftest`).
"""

import copy
import io
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")

import halve
from halve.formats.bitmask import BitmaskMatrix, pack
from halve.formats.quantized_packing import pack as pack_codes
from halve.grids import QuantScheme, fit_quant_params
from halve.runtime.cpu import (
    bitmask_linear,
    operators,
    packed_linear,
    quantized_linear,
    quantized_operators,
)
from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.quantized_linear import QuantizedEmbedding, QuantizedLinear
from halve.runtime.cuda import bitmask_products, codes_products, support
from halve.runtime.cuda.bitmask_products import Bitmask
from halve.runtime.cuda.side_index import has_slack, tile_kept, with_slack, word_starts

pytestmark = pytest.mark.skipif(
    not bitmask_products.INTERPRETED, reason="kernels are compiled, for a GPU"
)
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}
over_dtypes = pytest.mark.parametrize("dtype", LIMITS)
# Less than a word, whole and ragged words, ragged programs; several steps of a program.
SHAPES = [(1, 1), (3, 63), (4, 64), (5, 65), (2, 264), (9, 1000), (4, 1024)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_matrix(shape, dtype, kept=0.5):
    """Return a matrix with an empty row, a full one, and a minus zero."""
    weight = torch.randn(shape).masked_fill(torch.rand(shape) >= kept, 0)
    if shape[0] > 2:
        weight[1], weight[2] = 0, torch.randn(shape[1])
    weight[-1, -1] = -0.0
    return weight.to(dtype)


def bitmask(weight):
    packed = pack(weight)
    index = word_starts(packed.mask), packed.columns, tile_kept(packed.mask)
    return Bitmask(with_slack(packed.values), packed.mask, packed.offsets, *index)


def relative_error(found, wanted):
    difference = (found.detach().double() - wanted).norm()
    return float(difference / wanted.norm().clamp(min=1e-30))


@over_dtypes
@over_shapes
def test_unpacking_restores_every_bit(shape, dtype):
    weight = random_matrix(shape, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    found = bitmask_products.unpack(bitmask(weight))
    assert torch.equal(found.view(bits), weight.view(bits))


@over_dtypes
@over_shapes
def test_every_batch_is_multiplied(shape, dtype):
    weight = random_matrix(shape, dtype)
    matrix, bias = bitmask(weight), torch.randn(shape[0]).to(dtype)
    for batch in (0, 1, 3, 17):
        x = torch.randn(batch, shape[1]).to(dtype)
        wanted = x.double() @ weight.double().T + bias.double()
        found = bitmask_products.multiply(x, matrix, bias)
        assert found.dtype == dtype
        assert relative_error(found, wanted) < LIMITS[dtype]


@over_dtypes
@pytest.mark.parametrize(("rows", "warps", "unroll"), [(2, 1, 2), (4, 4, 1), (8, 2, 3)])
def test_work_may_be_divided_in_any_way(rows, warps, unroll, dtype):
    weight = random_matrix((5, 1100), dtype)
    matrix, bias = bitmask(weight), torch.randn(5).to(dtype)
    for batch in (1, 2):
        x, y = torch.randn(batch, 1100).to(dtype), torch.empty(batch, 5).to(dtype)
        way = {"rows": rows, "warps": warps, "unroll": unroll}
        bitmask_products.multiply_packed(x, matrix, bias, y, **way)
        wanted = x.double() @ weight.double().T + bias.double()
        assert relative_error(y, wanted) < LIMITS[dtype]


@pytest.mark.parametrize("kept", [0.0, 0.02, 1.0])
def test_any_fraction_may_be_zero(kept):
    weight = random_matrix((2, 300), torch.float16, kept)
    if not kept:
        weight.zero_()
    for batch in (1, 2):
        x = torch.randn(batch, 300).half()
        found = bitmask_products.multiply(x, bitmask(weight))
        assert relative_error(found, x.double() @ weight.double().T) < 2e-3


def test_offsets_may_be_of_64_bits_and_rows_very_long():
    columns = 2**16 + 1
    weight, x = random_matrix((1, columns), torch.float32), torch.randn(1, columns)
    matrix = bitmask(weight)
    assert matrix.starts.dtype == torch.int32
    matrix = matrix._replace(offsets=matrix.offsets.to(torch.uint64))
    wanted = x.double() @ weight.double().T
    assert relative_error(bitmask_products.multiply(x, matrix), wanted) < 1e-6


def test_the_fullest_tile_is_found():
    weight = torch.zeros(3, 600)
    weight[0, 200:300], weight[1, 256:259], weight[2, 512:] = 1, 1, 1
    assert tile_kept(pack(weight).mask) == 88
    weight[1, 256:512] = 1
    assert tile_kept(pack(weight).mask) == 256


def test_values_without_slack_are_copied():
    weight = random_matrix((4, 128), torch.float32)
    packed = pack(weight)
    matrix = bitmask(weight)._replace(values=packed.values.clone())
    assert not has_slack(matrix.values)
    assert torch.equal(bitmask_products.unpack(matrix), weight)


@over_dtypes
def test_the_trial_run_finds_no_fault(dtype):
    assert support.find_fault(torch.device("cpu"), dtype) is None


def test_the_trial_run_finds_a_fault(monkeypatch):
    cpu, dtype = torch.device("cpu"), torch.float32
    monkeypatch.setattr(codes_products, "multiply", lambda x, m: torch.zeros(1, 2))
    fault = support.find_fault(cpu, dtype)
    assert fault == "they multiply by a matrix of codes wrongly"
    monkeypatch.setattr(bitmask_products, "unpack", lambda m: torch.zeros(2, 64))
    assert support.find_fault(cpu, dtype) == "they unpack a matrix of values wrongly"


# --- Codes --------------------------------------------------------------------------

# Every width, zero points, midrise, groups that cross bytes; with and without a mask.
SCHEMES = [
    (QuantScheme(8, 32), 0.0),
    (QuantScheme(8, 64), 0.6),
    (QuantScheme(4, 32, symmetric=False), 0.0),
    (QuantScheme(4, 1000), 0.8),
    (QuantScheme(3, 32, symmetric=False), 0.0),
    (QuantScheme(3, 32, symmetric=False), 0.9),
    (QuantScheme(2, 96, midrise=True), 0.0),
    (QuantScheme(2, 32, midrise=True), 0.5),
]
over_schemes = pytest.mark.parametrize(("scheme", "zeros"), SCHEMES, ids=str)
# Aligned rows of codes, and rows that end within a byte.
CODE_SHAPES = [(9, 320), (3, 65)]


def quantized(scheme, shape, zeros, dtype=torch.float16):
    """Return a random matrix on a grid, packed as codes."""
    weight = torch.randn(shape)
    weight = weight.masked_fill(torch.rand(shape) < zeros, 0)
    params = fit_quant_params(scheme.exact_in(dtype), weight)
    rounded = params.fake_quantize(weight).masked_fill(weight == 0, 0)
    packed = pack_codes(rounded.to(dtype), params)
    assert packed is not None
    assert (packed.mask is not None) == (zeros > 0)
    return packed


def codes(packed):
    starts = None if packed.mask is None else word_starts(packed.mask)
    parts = packed.codes, packed.scales, packed.zeros, packed.mask, packed.offsets
    sizes = packed.columns, packed.bits, packed.group_size, packed.midrise
    return codes_products.Codes.of((*parts, starts), sizes)


@over_schemes
def test_codes_are_unpacked_and_looked_up_to_the_bit(scheme, zeros):
    for shape in CODE_SHAPES:
        packed = quantized(scheme, shape, zeros)
        matrix, weight = codes(packed), packed.unpack()
        found = torch.empty_like(weight)
        codes_products.unpack_rows(matrix, 0, found)
        assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
        ids = torch.tensor([[2, 0], [1, 2]])
        rows = codes_products.lookup(ids, matrix, torch.float32)
        assert torch.equal(rows, weight[ids].float())


@over_schemes
def test_codes_are_multiplied(scheme, zeros):
    for shape, dtype in zip(CODE_SHAPES, (torch.bfloat16, torch.float16), strict=True):
        packed = quantized(scheme, shape, zeros)
        weight, bias = packed.unpack().double(), torch.randn(shape[0]).to(dtype)
        for batch in (1, 3, 6):
            x = torch.randn(batch, shape[1]).to(dtype)
            wanted = x.double() @ weight.T + bias.double()
            found = codes_products.multiply(x, codes(packed), bias)
            assert found.dtype == dtype
            assert relative_error(found, wanted) < LIMITS[dtype]


def test_codes_need_not_be_aligned():
    packed = quantized(QuantScheme(4, 32), (4, 64), 0.0)
    memory = torch.zeros(packed.codes.numel() + 1, dtype=torch.uint8)
    memory[1:] = packed.codes.flatten()
    matrix = codes(packed)._replace(codes=memory[1:].view(packed.codes.shape))
    assert not matrix.constants["ALIGNED"]
    found = torch.empty(4, 64, dtype=torch.float16)
    codes_products.unpack_rows(matrix, 0, found)
    assert torch.equal(found, packed.unpack())


def test_a_row_that_does_not_exist_is_nan():
    packed = quantized(QuantScheme(4, 32), (4, 64), 0.0)
    ids = torch.tensor([4, -1, 3], dtype=torch.int32)
    found = codes_products.lookup(ids, codes(packed), torch.float32)
    assert found[:2].isnan().all() and torch.equal(found[2], packed.unpack()[3].float())


def test_parts_of_wrong_sizes_are_rejected():
    packed = quantized(QuantScheme(4, 32), (4, 64), 0.7)
    for part in ("scales", "mask", "offsets"):
        changed = replace(packed, **{part: getattr(packed, part)[:-1]})
        with pytest.raises(RuntimeError, match="do not fit together"):
            codes(changed)


# --- The layer, for which the CPU is a GPU -------------------------------------------


@pytest.fixture
def cuda_operators():
    """Let operators that have no kernels of the CPU run those of GPUs there."""
    with torch.library._scoped_library("halve", "IMPL") as library:
        for name in ("packed_linear_indexed", "unpack_indexed"):
            function = operators._IMPLEMENTATIONS[name][1]["CUDA"]
            library.impl(name, function, "CPU")
        yield


@pytest.fixture
def on_gpu(monkeypatch, cuda_operators):
    """Let kernels run on the CPU, until the returned function is called."""
    state = [True]
    modules = bitmask_linear, packed_linear, quantized_linear, quantized_operators
    for module in modules:
        monkeypatch.setattr(module, "runs_kernels", lambda *_: state[0])
    # Operators that have kernels of the CPU as well.
    cuda = {
        "quantized_linear": quantized_operators._quantized_linear_cuda,
        "quantized_lookup": quantized_operators._quantized_lookup_cuda,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(quantized_linear, name, function)
    return lambda: state.clear() or state.append(False)


def moved(weight, bias=None, transposed=False):
    """Return the layer of a matrix, as it is when it has been moved."""
    bias = None if bias is None else torch.nn.Parameter(bias)
    packed = pack(weight.T.contiguous() if transposed else weight, transposed)
    return BitmaskLinear(packed, bias)._apply(torch.clone)


@over_dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_on_a_gpu_multiplies(on_gpu, dtype, transposed):
    weight, bias = random_matrix((9, 130), dtype), torch.randn(9).to(dtype)
    layer = moved(weight, bias, transposed)
    assert layer.weight_starts is not None
    for shape in ((2, 3, 130), (130,), (0, 130)):
        x = torch.randn(shape).to(dtype)
        wanted = x.double() @ weight.double().T + bias.double()
        assert relative_error(layer(x), wanted) < LIMITS[dtype]
    x = torch.randn(130, 5).to(dtype).T
    wanted = x.double() @ weight.double().T + bias.double()
    assert relative_error(layer(x), wanted) < LIMITS[dtype]
    assert torch.equal(layer.dense_weight(), weight)


def test_gradients_pass_to_input_and_bias(on_gpu):
    weight, bias = random_matrix((9, 130), torch.float32), torch.randn(9)
    layer, x = moved(weight, bias), torch.randn(2, 3, 130, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    plain = bias.clone().requires_grad_()
    torch.nn.functional.linear(y, weight, plain).square().sum().backward()
    assert layer.bias is not None
    for found, wanted in ((x.grad, y.grad), (layer.bias.grad, plain.grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_operands_that_do_not_fit_are_rejected(on_gpu):
    layer = moved(random_matrix((9, 130), torch.float32))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(2, 130).half())
    with pytest.raises(RuntimeError, match="do not fit"):
        layer(torch.randn(2, 131))


def test_the_file_does_not_change(on_gpu):
    layer = moved(random_matrix((9, 130), torch.float16))
    parts = pack(random_matrix((9, 130), torch.float16)).parts
    names = {"weight" + suffix for suffix in parts}
    assert set(layer.state_dict()) == names
    assert layer.weight.numel() == int(layer.weight_offsets[-1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half", "load", "replace"])
def test_the_side_index_is_that_of_the_mask(on_gpu, how):
    weight, other = (random_matrix((9, 130), torch.float32) for _ in range(2))
    other[5:7] = other[5:7].roll(3, 1)
    layer = moved(weight)
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        layer = torch.load(file, weights_only=False)
    elif how == "half":
        layer, weight = layer.half(), weight.half()
        assert layer.weight_mask.dtype == torch.uint64
    elif how == "load":  # in place, a matrix with as many values
        weight = weight.roll(7, 1)
        layer.load_state_dict(moved(weight).state_dict())
    else:  # one by one, as accelerate does
        packed = pack(other)
        layer.weight = torch.nn.Parameter(packed.values, requires_grad=False)
        for name in ("mask", "offsets"):
            layer._buffers[f"weight_{name}"] = getattr(packed, name)
        weight = other
    x = torch.randn(1, 130).to(weight.dtype)
    wanted = x.double() @ weight.double().T
    assert relative_error(layer(x), wanted) < LIMITS[weight.dtype]
    assert torch.equal(layer.dense_weight(), weight)
    assert has_slack(layer.weight)


def test_back_on_the_cpu_the_side_index_is_gone(on_gpu):
    weight = random_matrix((9, 130), torch.float32)
    layer = moved(weight)
    on_gpu()  # it is the CPU again
    layer._apply(torch.clone)
    assert layer.weight_starts is None
    x = torch.randn(3, 130)
    assert relative_error(layer(x), x.double() @ weight.double().T) < 1e-6


def test_an_index_made_in_inference_mode_has_gradients_later(on_gpu):
    weight = random_matrix((9, 130), torch.float32)
    layer = BitmaskLinear(pack(weight))
    with torch.inference_mode():
        layer(torch.randn(1, 130))
    x = torch.randn(2, 130, requires_grad=True)
    layer(x).sum().backward()
    wanted = weight.sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_autocast_converts_the_input(on_gpu):
    weight = random_matrix((9, 130), torch.bfloat16)
    layer, x = moved(weight), torch.randn(2, 130)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert relative_error(found, x.double() @ weight.double().T) < 1e-2


def test_references_agree_with_the_kernels(cuda_operators):
    weight = random_matrix((9, 130), torch.float32)
    packed, x = pack(weight), torch.randn(2, 130)
    parts = [packed.values, packed.mask, packed.offsets, word_starts(packed.mask)]
    assert isinstance(packed, BitmaskMatrix)
    found = operators.packed_linear_indexed(x, parts, None, 130, 90)
    wanted = operators.packed_linear_indexed_reference(x, parts, None, 130, 90)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(operators.unpack_indexed(parts, 130, 90), weight)
    assert torch.equal(operators.unpack_indexed_reference(parts, 130, 90), weight)
    with FakeTensorMode() as mode:
        shapes = [mode.from_tensor(part) for part in parts]
        fake = operators.packed_linear_indexed(
            mode.from_tensor(x), shapes, None, 130, 90
        )
        assert fake.shape == found.shape
        assert operators.unpack_indexed(shapes, 130, 90).shape == weight.shape


@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_layers_of_codes_on_a_gpu(on_gpu, zeros):
    packed = quantized(QuantScheme(4, 32, symmetric=False), (9, 130), zeros)
    bias, weight = torch.randn(9).half(), packed.unpack().double()
    layer = QuantizedLinear(packed, torch.nn.Parameter(bias))._apply(torch.clone)
    assert (layer.weight_starts is None) == (zeros == 0)
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(2, 3, 130).to(dtype)
        wanted = x.double() @ weight.T + bias.double()
        assert relative_error(layer(x), wanted) < 2e-3
    assert "weight_starts" not in layer.state_dict()
    embedding = QuantizedEmbedding(packed)._apply(torch.clone)
    ids = torch.tensor([[8, 0]])
    assert torch.equal(embedding(ids), packed.unpack()[ids])
    x = torch.randn(2, 130, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weight.sum(0).expand(2, -1)) < 1e-2


def test_codes_multiply_on_the_cpu_again(on_gpu):
    packed = quantized(QuantScheme(4, 32), (9, 130), 0.7)
    layer = QuantizedLinear(packed)._apply(torch.clone)
    on_gpu()
    layer._apply(torch.clone)
    assert layer.weight_starts is None
    assert len(layer.device_operands) == len(layer.operands)


def test_accelerate_may_offload_a_layer(on_gpu):
    weight, bias = random_matrix((9, 130), torch.float32), torch.randn(9)
    layer = BitmaskLinear(pack(weight), torch.nn.Parameter(bias))
    values = {name: t.clone() for name, t in layer.state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=values)
    add_hook_to_module(layer, hook)
    x = torch.randn(2, 130)
    wanted = x.double() @ weight.double().T + bias.double()
    for _ in range(2):
        assert layer.weight.is_meta
        assert relative_error(layer(x), wanted) < 1e-6


def test_a_model_on_a_gpu_computes_what_the_dense_one_does(on_gpu, pico, tmp_path):
    halve.prune(pico("llama"), tmp_path / "dense", sparsity="50%", solver="magnitude")
    halve.pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("dense", "packed")
    )
    layers = [m for m in packed.modules() if isinstance(m, BitmaskLinear)]
    assert layers and all(layer.weight_starts is not None for layer in layers)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits)
    packed.save_pretrained(tmp_path / "again")
    before, after = (
        {
            name: tensor.shape
            for path in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for folder in ("packed", "again")
    )
    assert before == after
    with torch.no_grad():
        found = torch.compile(layers[0], backend="eager", fullgraph=True)(
            torch.ones(1, layers[0].in_features)
        )
    torch.testing.assert_close(found[0], layers[0].dense_weight().sum(1))
