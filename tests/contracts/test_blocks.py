"""The blocks of a model are those that its language model runs."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from halve.errors import UnsupportedModelError
from halve.models.blocks import find_blocks
from tests.tables import FAMILIES, family_config


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("row", FAMILIES)
def test_every_family_has_one_list(row):
    config = family_config(row)
    _, blocks = find_blocks(on_meta(config))
    assert len(blocks) == config.num_hidden_layers


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LARGE = SMALL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5}


def git(tower):
    config = AutoConfig.for_model("git", vocab_size=512, **SMALL)
    config.vision_config.update(tower | {"image_size": 32})
    return config


def multimodal(kind, **text):
    config = AutoConfig.for_model(kind)
    config.get_text_config().update(SMALL | {"head_dim": 16} | text)
    return config


MULTIMODAL = {
    "git": (lambda: git(LARGE), "git.encoder.layer"),
    "git, equally deep": (
        lambda: git(LARGE | {"num_hidden_layers": 2}),
        "git.encoder.layer",
    ),
    "fuyu": (lambda: multimodal("fuyu"), "language_model.layers"),
}


@pytest.mark.parametrize("row", MULTIMODAL)
def test_a_tower_is_not_the_language_model(row):
    make, path = MULTIMODAL[row]
    found, blocks = find_blocks(on_meta(make()))
    assert found.endswith(path)
    assert len(blocks) == 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)


def test_a_list_beside_the_blocks_is_told_by_its_length():
    model = on_meta(family_config("llama"))
    model.model.more = nn.ModuleList(Layer() for _ in range(7))
    model.model.projections = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert find_blocks(model)[0] == "model.layers"
    model.model.same = nn.ModuleList(Layer() for _ in range(2))
    with pytest.raises(UnsupportedModelError, match=r"model.layers, model.same"):
        find_blocks(model)


def test_no_list_is_refused():
    model = on_meta(family_config("llama"))
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="no decoder blocks"):
        find_blocks(model)
