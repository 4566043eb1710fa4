"""The kernels for GPUs against plain products, in Triton's interpreter.

`test_cuda_kernels` runs this file in a process with TRITON_INTERPRET=1, which must be
set before triton is imported. Kernels then run on tensors of the CPU, and so do layers
for which the CPU is declared to be a GPU.
"""

import copy
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halve.formats.bitmask import BitmaskMatrix, pack
from halve.runtime.cpu import bitmask_linear, operators, packed_linear
from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cuda import bitmask_products, support
from halve.runtime.cuda.bitmask_products import Bitmask
from halve.runtime.cuda.side_index import has_slack, tile_kept, with_slack, word_starts

assert bitmask_products.INTERPRETED, "TRITON_INTERPRET=1 is not set"
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
@pytest.mark.parametrize(("rows", "warps", "unroll"), [(1, 1, 2), (4, 4, 1), (8, 2, 3)])
def test_work_may_be_divided_in_any_way(rows, warps, unroll, dtype):
    weight = random_matrix((9, 1100), dtype)
    matrix, bias = bitmask(weight), torch.randn(9).to(dtype)
    for batch in (1, 2):
        x, y = torch.randn(batch, 1100).to(dtype), torch.empty(batch, 9).to(dtype)
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
    columns = 2**16 + 70
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
    monkeypatch.setattr(bitmask_products, "unpack", lambda m: torch.zeros(2, 64))
    fault = support.find_fault(torch.device("cpu"), torch.float32)
    assert fault == "they unpack a matrix wrongly"


# --- The layer, for which the CPU is a GPU -------------------------------------------


def register_cuda_operators_for_the_cpu():
    for name in ("packed_linear_indexed", "unpack_indexed"):
        function = operators._IMPLEMENTATIONS[name][1]["CUDA"]
        operators.library.impl(name, function, "CPU")


register_cuda_operators_for_the_cpu()


@pytest.fixture
def on_gpu(monkeypatch):
    """Let kernels run on the CPU, until the returned function is called."""
    state = [True]
    for module in (bitmask_linear, packed_linear):
        monkeypatch.setattr(module, "runs_kernels", lambda *_: state[0])
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


def test_references_agree_with_the_kernels():
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
