"""Zeros stay zero, whoever changes the weights."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import halve
from halve.errors import HalveError


@pytest.fixture(scope="module")
def folder(pico, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    halve.prune(pico("llama"), out, solver="magnitude", sparsity="2:4")
    return out


@pytest.fixture
def model(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() == 0 for n, p in model.named_parameters() if "proj" in n}


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(2 * 8).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adam, one by one": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
}


@pytest.mark.parametrize("row", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 2])
def test_under_any_optimizer(row, before, model):
    """Also where the optimizer has gathered momentum before zeros were held."""
    optimizer = OPTIMIZERS[row](model.parameters())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    zeros = zeros_of(model)
    for _ in range(before):
        step(model, optimizer)
    if before:  # what was pruned moved
        assert any((zeros[n] != z).any() for n, z in zeros_of(model).items())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
    halve.keep_zeros(model)
    for _ in range(3):
        step(model, optimizer)
        for name, held in zeros_of(model).items():
            assert torch.equal(held, zeros[name]), name
    assert not torch.equal(start["lm_head.weight"], model.lm_head.weight)


def test_gradients_of_zeros_do_not_count(model):
    with halve.keep_zeros(model):
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        for name, zeros in zeros_of(model).items():
            assert not model.get_parameter(name).grad[zeros].any()


def test_what_is_let_go_moves(model):
    zeros = zeros_of(model)
    with halve.keep_zeros(model) as kept:
        assert kept.count == sum(int(z.sum()) for z in zeros.values())
    step(model, OPTIMIZERS["sgd"](model.parameters()))
    assert any(not torch.equal(zeros[n], z) for n, z in zeros_of(model).items())


def test_what_is_written_into_weights_is_not_saved(model, tmp_path):
    zeros = zeros_of(model)
    halve.keep_zeros(model)
    with torch.no_grad():
        for name in zeros:
            model.get_parameter(name).add_(1)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, held in zeros_of(saved).items():
        assert torch.equal(held, zeros[name]), name


@pytest.mark.parametrize("callback", [False, True])
def test_under_the_trainer(callback, model, tmp_path):
    zeros = zeros_of(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    ids = list(range(8))
    rows: Any = [{"input_ids": ids, "labels": ids}] * 2
    callbacks: Any = [halve.KeepZerosCallback()] if callback else []
    if not callback:
        halve.keep_zeros(model)
    start = model.lm_head.weight.detach().clone()
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    assert not torch.equal(start, model.lm_head.weight)
    for name, held in zeros_of(model).items():
        assert torch.equal(held, zeros[name]), name


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_by_name_in_a_wrapped_copy(model, folder):
    """As where FSDP has put other parameters in the place of the model's."""
    kept = halve.keep_zeros(model)
    other = AutoModelForCausalLM.from_pretrained(folder)
    zeros = zeros_of(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    kept.apply(Wrapped(other))
    assert zeros_of(other).keys() == zeros.keys()
    for name, held in zeros_of(other).items():
        assert torch.equal(held, zeros[name]), name
    with pytest.raises(HalveError, match="Gather the parameters"):
        kept.apply(nn.Linear(2, 2))


def test_a_model_without_zeros_is_refused():
    with pytest.raises(HalveError, match="has zeros to hold"):
        halve.keep_zeros(nn.Linear(4, 4))


def test_weights_that_are_all_zeros_are_free():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight.zero_()
    assert set(halve.keep_zeros(model).held) == {"0.weight"}


def test_nothing_outlives_the_model():
    model: Any = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0
    layer = weakref.ref(model[0])
    halve.keep_zeros(model)
    del model
    gc.collect()
    assert layer() is None
