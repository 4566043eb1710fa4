"""What `--device auto` stands for, alone and among the processes of torchrun."""

import warnings

import pytest
import torch

from halve import devices
from halve.devices import choose_device
from halve.distributed import Ranks
from halve.errors import DistributedError, HalveWarning

SECOND_OF_TWO = Ranks(rank=1, size=2, local=1, local_size=2)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are two GPUs; return the devices that are made current."""
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    devices._mention_gpu.cache_clear()
    yield current
    devices._mention_gpu.cache_clear()


def test_auto_takes_the_cpu_and_mentions_a_gpu_once(gpus):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose_device("auto").type for _ in range(3)] == ["cpu"] * 3
    [said] = caught
    assert said.category is HalveWarning
    assert "H100" in str(said.message)
    assert "--device cuda" in str(said.message)


def test_without_a_gpu_nothing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_device("auto").type == "cpu"


def test_one_constant_decides(gpus, monkeypatch):
    monkeypatch.setattr(devices, "AUTO_TAKES_GPU", True)
    assert choose_device("auto").type == "cuda"
    assert SECOND_OF_TWO.device("auto") == "cuda:1"
    assert gpus == ["cuda:1"]


@pytest.mark.parametrize(("ranks", "name", "chosen"), [
    (Ranks(), "auto", "auto"),
    (Ranks(), "cuda:1", "cuda:1"),
    (SECOND_OF_TWO, "auto", "cpu"),
    (SECOND_OF_TWO, "cpu", "cpu"),
    (SECOND_OF_TWO, "cuda", "cuda:1"),
    # One process on each of two machines may name any GPU of its machine.
    (Ranks(rank=1, size=2), "cuda", "cuda:0"),
    (Ranks(rank=1, size=2), "cuda:1", "cuda:1"),
], ids=str)  # fmt: skip
def test_each_process_has_a_gpu_of_its_own(ranks, name, chosen, gpus):
    assert ranks.device(name) == chosen
    # Tensors that arrive from other processes are placed on the current GPU.
    assert gpus == [chosen] * (ranks.size > 1 and chosen.startswith("cuda"))


def test_a_gpu_is_not_shared(gpus):
    with pytest.raises(DistributedError, match="2 processes need a GPU each"):
        SECOND_OF_TWO.device("cuda:0")
    with pytest.raises(DistributedError, match="3 processes need a GPU each"):
        Ranks(rank=1, size=3, local=1, local_size=3).device("cuda")
