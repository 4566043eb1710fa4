"""Packing a pruned checkpoint, and unpacking it again."""

from halve.packing.rewrite import pack_model, unpack_model

__all__ = ["pack_model", "unpack_model"]
