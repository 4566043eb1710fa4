"""Prune some matrices less than the rest, and leave others dense."""

from importlib.resources import files

import halve

MODEL = str(files("halve") / "data/pycode-opt")

record = halve.prune(
    MODEL,
    "ruled",
    sparsity="60%",
    # Regular expressions for names of tensors; the last that matches counts.
    rules=("fc2=40%", r"layers\.5\.=2:4"),
    skip=(r"layers\.0\.self_attn",),
    solver="magnitude",
)
for matrix in record.all_matrices:
    print(f"{matrix.tensor}: {matrix.sparsity:.1%} zeros")
