"""Where kernels for GPUs cannot run, one warning says why; a GPU is not needed."""

import pytest
import torch
from torch import nn

from halve.errors import HalveWarning
from halve.formats.bitmask import pack
from halve.runtime.cpu import packed_linear
from halve.runtime.cpu.bitmask_linear import BitmaskLinear
from halve.runtime.cpu.replace_modules import use_device_kernels
from halve.runtime.cuda import support
from halve.runtime.cuda.support import runs_kernels

GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _forget():
    support._work.cache_clear()
    yield
    support._work.cache_clear()


def broken(*_):
    raise RuntimeError("no C compiler\nwas found")


OBSTACLES = {
    "Triton is not installed": {"has_triton": lambda _: False},
    "RuntimeError: no C compiler was found": {"find_fault": broken},
    "they unpack wrongly": {"find_fault": lambda *_: "they unpack wrongly"},
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_an_obstacle_is_told_once(reason, monkeypatch):
    monkeypatch.setattr(support, "has_triton", lambda _: True)
    for name, function in OBSTACLES[reason].items():
        monkeypatch.setattr(support, name, function)
    with pytest.warns(HalveWarning, match=reason):
        assert not runs_kernels(GPU, torch.bfloat16)
    assert not runs_kernels(GPU, torch.bfloat16)  # a second warning would be an error


def test_there_are_no_kernels_for_float64(monkeypatch):
    monkeypatch.setattr(support, "has_triton", lambda _: True)
    with pytest.warns(HalveWarning, match="none for float64"):
        assert not runs_kernels(GPU, torch.float64)


def test_other_devices_are_not_tried():
    for device in ("cpu", "meta"):
        assert not runs_kernels(torch.device(device), torch.bfloat16)


class Model(nn.Module):
    def __init__(self, weight) -> None:
        super().__init__()
        self.layer = BitmaskLinear(pack(weight))

    def tie_weights(self) -> None:
        """Nothing is tied."""


@pytest.mark.parametrize("runs", [False, True])
def test_layers_without_kernels_on_their_gpu_are_unpacked(runs, monkeypatch):
    weight = torch.randn(9, 130).masked_fill(torch.rand(9, 130) < 0.5, 0)
    model = Model(weight)
    supported = property(lambda self: runs)
    monkeypatch.setattr(packed_linear._PackedModule, "is_supported", supported)
    assert use_device_kernels(model) == runs
    assert isinstance(model.layer, BitmaskLinear) == runs
    if not runs:
        assert torch.equal(model.layer.weight, weight)
