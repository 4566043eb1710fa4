"""How much a model keeps of each token while it generates."""

from typing import Any


def cache_width(config: Any) -> int:  # noqa: ANN401
    """Return the numbers that all blocks keep of one token: its keys and values.

    Numbers of heads and their widths come from the entries that transformers'
    `StaticCache` reads. It is an upper bound where blocks keep less: those with a
    sliding window or the state of a recurrence, and Falcon's, which share one head.

    Args:
        config: A configuration of one of transformers' classes.
    """
    text = config.get_text_config()
    return _count(text, "num_hidden_layers") * _width_in_block(text)


def _width_in_block(text: Any) -> int:  # noqa: ANN401
    if latent := _count(text, "kv_lora_rank"):  # multi-head latent attention, DeepSeek
        return latent + _count(text, "qk_rope_head_dim")
    heads = _count(text, "num_attention_heads") or 1
    head = _count(text, "head_dim") or -(-text.hidden_size // heads)
    groups = _count(text, "num_key_value_heads") or heads
    return groups * 2 * head


def _count(config: Any, name: str) -> int:  # noqa: ANN401
    """Return an entry of a config; 0 where it has none, or one for each block."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
