"""Names that options accept.

They are repeated here because the modules that define them import torch; a test
compares them.
"""

SOLVER_CHOICES = ("auto", "admm", "sparsegpt", "wanda", "magnitude")
QUANTIZE_CHOICES = ("int8", "int4", "int3", "int2")
HEAD_CHOICES = ("auto", "none", "int8", "int4")
ACTIVATION_CHOICES = ("int16", "int8")
ALLOCATION_CHOICES = ("auto", "uniform", "importance", "error")
PRECISION_CHOICES = ("highest", "high")
BOS_CHOICES = ("auto", "never")
# Kinds of devices, besides `auto`.
DEVICE_CHOICES = ("cpu", "cuda")
