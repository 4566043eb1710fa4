"""Find the decoder blocks of a language model: by what runs them, not by their size.

In a multimodal model the tower of an encoder may hold more parameters than the language
model. So the lists of blocks are those of modules that share the language model's
config; of several, the one that is as long as the config says.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from halve.errors import UnsupportedModelError


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:  # noqa: ANN401
    """Return the name and the list of the blocks that a language model runs in order.

    Args:
        model: A causal language model; its parameters may be on the meta device.

    Raises:
        UnsupportedModelError: There is no such list, or there are several of which none
            is as long as the config says.
    """
    lists = _stacks(model)
    if len(lists) > 1:
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        lists = {n: b for n, b in lists.items() if len(b) == depth} or lists
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder blocks: it contains no ModuleList "
            "of modules.",
            "Open an issue that names the model.",
        )
    if len(lists) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has several lists of blocks ({', '.join(lists)}), "
            "and does not run one of them from the first block to the last.",
            "Open an issue that names the model.",
        )
    return next(iter(lists.items()))


def _stacks(model: Any) -> dict[str, nn.ModuleList]:  # noqa: ANN401
    """Return the lists of modules that are in no other list, of the language model.

    Those of the whole model, where none has the config of its language model.
    """
    named = dict(model.named_modules())
    lists = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.ModuleList) and _is_stack(module)
    }
    outer = {
        name: blocks
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    reading = {n: b for n, b in outer.items() if _reads_text(model, _owner(named, n))}
    return reading or outer


def _is_stack(blocks: nn.ModuleList) -> bool:
    """Whether a list is not empty, and holds more than single layers."""
    return len(blocks) > 0 and all(any(True for _ in b.children()) for b in blocks)


def _owner(named: dict[str, nn.Module], name: str) -> PreTrainedModel | None:
    """Return the innermost model of transformers that a module is a part of."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(owner := named[name], PreTrainedModel):
            return owner
    return None


def _reads_text(model: Any, owner: PreTrainedModel | None) -> bool:  # noqa: ANN401
    """Whether a part of a model has the config of its language model."""
    if owner is None:
        return True
    configs = (model.config, model.config.get_text_config())
    return type(owner.config) in {type(config) for config in configs}
