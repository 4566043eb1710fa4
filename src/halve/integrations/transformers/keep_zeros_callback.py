"""`keep_zeros` for transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback

from halve.runtime.keep_zeros import KeptZeros, keep_zeros


class KeepZerosCallback(TrainerCallback):
    """Holds the zeros of the model that a Trainer trains, while it trains it.

        Trainer(model, args, train_dataset=data, callbacks=[halve.KeepZerosCallback()])

    Raises:
        HalveError: When training begins: no matrix of the model has zeros.
    """

    def __init__(self) -> None:
        self._kept: KeptZeros | None = None

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:  # noqa: ANN401
        """Hold the zeros."""
        self._kept = keep_zeros(model)

    def on_train_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Let go."""
        if self._kept is not None:
            self._kept.apply()
            self._kept.remove()
            self._kept = None
