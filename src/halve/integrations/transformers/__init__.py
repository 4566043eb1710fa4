"""Packed checkpoints for `from_pretrained`: the import hook and the quantizer."""
