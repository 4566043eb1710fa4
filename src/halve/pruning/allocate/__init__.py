"""Sparsity per block and zeros per matrix: the allocation search and its arithmetic."""
