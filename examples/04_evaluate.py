"""Measure what the model of 01_prune.py has lost against the dense one."""

from importlib.resources import files

import halve

MODEL = str(files("halve") / "data/pycode-opt")

# Text that is held out: other modules of this Python's library than for calibration.
result = halve.compare("half", MODEL, data="stdlib", segments=12)
for name, measured in (("dense", result.reference), ("pruned", result.model)):
    error = measured.standard_error
    print(f"{name}: perplexity {measured.perplexity:.2f} +/- {error:.2f}")
print(f"KL divergence {result.kl_mean:.4f} nats per token")
print(f"the same most likely token for {result.agreement:.1%} of the tokens")
