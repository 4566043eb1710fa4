"""How many tokens run through a block at once, and the memory that they take."""

import torch

# Tokens in a batch: enough to keep the cores busy, few enough for the widest
# activations. On CUDA more, which occupy all multiprocessors, and for which the weights
# are read and the sums written less often.
BATCH_TOKENS, CUDA_BATCH_TOKENS = 1024, 16384
# Activations of a batch may take one in so many parts of a GPU's memory.
_ACTIVATION_PARTS = 4


def max_batch_tokens(device: torch.device) -> int:
    """Return the tokens in a batch where the memory of the device does not limit it."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS


def batch_tokens_within(memory: int, token_nbytes: int) -> int:
    """Return the tokens in a batch on a GPU.

    Args:
        memory: Bytes of memory that the GPU has.
        token_nbytes: Bytes of the activations of one token.

    Returns:
        The largest of 16384, 8192, 4096, 2048 and 1024 whose activations take a quarter
        of the memory or less; 1024 if none does.
    """
    tokens = CUDA_BATCH_TOKENS
    while tokens > BATCH_TOKENS and tokens * token_nbytes > memory // _ACTIVATION_PARTS:
        tokens //= 2
    return tokens


def activation_nbytes(tokens: int, width: int, inner: int) -> int:
    """Return the bytes of activations while a batch runs through a block.

    Eight tensors are counted that are as wide as hidden states, such as the stream
    before and after the block, the output of a norm, queries, keys, values and the
    output of the attention; and three of the inner width: the inner activations of the
    feed-forward network before and after its function, or attention scores.

    Args:
        tokens: Tokens in the batch.
        width: Width of hidden states.
        inner: Numbers for each token in the widest activation within the block.
    """
    return 4 * tokens * (8 * width + 3 * inner)


def windows_per_batch(length: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """Return how many windows of a length run through a model at once."""
    return max(batch_tokens // length, 1)
