"""Train a pruned model to predict as the dense one does."""

from pathlib import Path
from typing import Unpack

from halve.api.keywords import takes, with_keywords
from halve.options import RecoverKeywords, RecoverOptions
from halve.records import RecoverRecord
from halve.recovery import recover_model


@takes(RecoverOptions)
def recover(
    model: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    options: RecoverOptions | None = None,
    **keywords: Unpack[RecoverKeywords],
) -> RecoverRecord:
    """Train the kept weights of a pruned model to predict as the dense model does.

    The loss is KL(reference || model) of the predictions for every token of windows of
    text, at temperature 1; there are no labels. All parameters of the blocks and the
    final norm are trained by AdamW without weight decay, in float32. Embeddings, the
    head, and matrices that lie on a quantization grid keep their values, so of a model
    that is quantized only norms and biases are trained. Zeros stay zero: the output has
    exactly those of the input, and is packed if the input is.

    Sixteen times in a run the weights, rounded to their dtypes, are judged on held-out
    windows of other documents, and the best state is stored. If none is better than the
    input, the output has the input's weights, bit for bit, and a HalveWarning says so.

    As with `prune`, `out` is either absent or complete, and the same call resumes after
    any interruption, from the last state that was judged, to the same bytes.

    Args:
        model: The pruned model, dense or packed: a folder or a name on the Hub.
        reference: The dense model; any model of the same vocabulary is accepted.
        out: The new folder; must not exist, or be empty.
        options: Text, steps and learning rate; by default `RecoverOptions()`.
        **keywords: Fields of `RecoverOptions`, which override those of the object.

    Returns:
        The record of the run, which `OUT/halve.json` contains too.

    Raises:
        NumericalError: The loss is not finite; a lower learning rate may help.
        HalveError: Any other error that you can fix.

    Cost:
        Memory: 16 bytes for each trained parameter (its value and gradient in float32,
        Adam's two moments), two for the best state, a byte for each weight of a matrix,
        and the dense model as it is stored; of activations, the inputs of all blocks
        and one block's for 1024 tokens, or one window, and their logits about six
        times. Disk: as much again twice, until the run ends. Time: about five forward
        passes of both models for each step's windows.

    Source:
        Hinton et al. (2015), with the dense model as the teacher and no labels.
    """
    merged = with_keywords(options or RecoverOptions(), keywords)
    return recover_model(model, reference, out, merged)
