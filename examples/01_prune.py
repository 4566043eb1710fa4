"""Plan a run, prune a model to 50 % zeros, and read the record."""

from importlib.resources import files

import halve

# A folder, or a name on the Hub such as "facebook/opt-125m".
MODEL = str(files("halve") / "data/pycode-opt")
OPTIONS = halve.PruneOptions(
    sparsity="50%", solver="sparsegpt", calibration="stdlib", samples=8
)

planned = halve.plan(MODEL, options=OPTIONS)
print(f"{planned.forecast.peak / 2**20:.0f} MiB will be in memory at most")

# Resumes if it was interrupted; changes nothing if it is finished.
record = halve.prune(MODEL, "half", options=OPTIONS)
for block in record.blocks:
    print(f"{block.name}: {block.sparsity:.2%} zeros, output error {block.error:.2%}")

assert halve.verify("half").sound
