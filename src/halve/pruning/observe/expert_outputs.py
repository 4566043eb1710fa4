"""What experts add to the outputs of their block, summed over tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from halve.models import Experts
from halve.pruning.observe.routing import RoutedInputs


@dataclass(frozen=True)
class ExpertSums:
    """What is summed of an expert's outputs f(x) and the router's weights g.

    Attributes:
        tokens: Number of tokens that the router sends to each expert, [experts].
        norms: Sum of ||f(x)|| over those, [experts], float64.
        weighted: Sum of g ||f(x)||, [experts], float64.
    """

    tokens: Tensor
    norms: Tensor
    weighted: Tensor


@torch.no_grad()
def sum_expert_outputs(routed: RoutedInputs) -> ExpertSums:
    """Run each expert on its calibration tokens, and sum the norms of its outputs.

    Held-out tokens are left out.

    Args:
        routed: What the module of experts is called with; its block is lent.

    Cost:
        One product of each token with each of its experts' matrices.
    """
    stream = routed.state.stream
    module = routed.state.block.get_submodule(routed.group.leader)
    assert isinstance(module, Experts), "the block is lent"
    sums = torch.zeros(2, len(routed.group.experts), dtype=torch.float64)
    for number in range(len(routed.group.experts)):
        fitted, _ = routed.sent_to(number)
        for part in fitted.split():
            inputs, _ = routed.gather(part.tokens)
            with stream.computing():
                norms = module.run_expert(number, inputs).norm(dim=1).double().cpu()
            sums[0, number] += norms.sum()
            sums[1, number] += (norms * part.weights.double()).sum()
    total = sums.to(stream.model.device)
    stream.ranks.all_reduce_(total)
    norms, weighted = total.cpu()
    return ExpertSums(torch.tensor(routed.tokens), norms, weighted)
