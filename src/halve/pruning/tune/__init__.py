"""Block-wise reconstruction of the dense outputs, after pruning."""
