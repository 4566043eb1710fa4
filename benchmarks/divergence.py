"""How far the predictions of compressed models diverge from those of the dense model.

All models share the tokens, the code of transformers and float32 arithmetic, so they
differ in nothing but their weights.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halve.calibration import Segments
from halve.evaluation import evaluation_segments
from halve.options import EvalOptions
from halve.runtime.blockwise_model import BlockwiseModel


@dataclass(frozen=True)
class Divergence:
    """Results over all predicted tokens.

    Attributes:
        kl: Mean of KL(dense || model), in nats per token.
        kl_error: Its standard error. Tokens of a segment are not independent, so it is
            that of the mean over segments.
        perplexity: exp of the mean loss.
        agreement: Fraction of tokens of which both models predict the same first.
    """

    kl: float
    kl_error: float
    perplexity: float
    agreement: float


def cut_text(model: Path, text: str, length: int, limit: int) -> Segments:
    """Cut a text as `halve eval` does, with BOS where the model expects it.

    Args:
        model: Folder of a model, whose tokenizer is used.
        text: The text, named as for `halve eval`.
        length: Tokens of a segment.
        limit: Segments at most.
    """
    options = EvalOptions(data=text, seq_len=length, segments=limit)
    return evaluation_segments(BlockwiseModel.open(model, "cpu"), options)


class Judge:
    """Compares models with a dense one, whose hidden states it computes only once."""

    def __init__(self, dense: Any, segments: Segments) -> None:
        """Run the dense model.

        Args:
            dense: A causal model of transformers, whose head is one linear layer.
            segments: The text.
        """
        self._segments = segments
        self._head = dense.get_output_embeddings()
        # Hidden states before the head: a hundredth of the size of the logits.
        self._hidden = list(self._states(dense))
        self.dense = self._compared(self._head, self._hidden)

    def judge(self, model: Any) -> Divergence:
        """Compare a model with the dense one."""
        return self._compared(model.get_output_embeddings(), self._states(model))

    def _states(self, model: Any) -> Iterator[Tensor]:
        """Yield what predicts targets, the head's inputs, [length - 1, width] each."""
        for ids in self._segments.ids:
            with torch.inference_mode():
                states = model.base_model(ids[None], use_cache=False)[0]
            yield self._segments.predictions(states)[0]

    @torch.inference_mode()
    def _compared(self, head: Any, states: Iterable[Tensor]) -> Divergence:
        """Compare a model, given by its head and the inputs of it, a segment each."""
        rows = []
        for targets, reference, hidden in zip(
            self._segments.targets, self._hidden, states, strict=True
        ):
            log_p = self._head(reference).log_softmax(-1)
            log_q = head(hidden).log_softmax(-1)
            rows.append(_compare(log_p, log_q, targets))
        kl, loss, agreement = torch.tensor(rows, dtype=torch.float64).T
        return Divergence(
            kl=float(kl.mean()),
            kl_error=float(kl.std()) / len(kl) ** 0.5,
            perplexity=math.exp(loss.mean()),
            agreement=float(agreement.mean()),
        )


def _compare(
    log_p: Tensor, log_q: Tensor, targets: Tensor
) -> tuple[float, float, float]:
    """Return a segment's mean divergence, loss and agreement.

    Args:
        log_p: Log-probabilities of the dense model, [tokens, vocabulary].
        log_q: The same of the other model.
        targets: The tokens that follow, [tokens].
    """
    # KL(p || q) = sum over the vocabulary of p (log p - log q).
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().mean()
    loss = functional.nll_loss(log_q, targets, reduction="none").double().mean()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    return float(kl), float(loss), float(agreement)
