"""Packed checkpoints in vLLM: `vllm serve OUT` where Halve is installed.

vLLM calls `register` in each of its processes (an entry point of the group
`vllm.general_plugins`) and then knows `quant_method: halve`. On a GPU, or with tensor
parallelism, matrices are unpacked while they are loaded and run as dense ones do: what
is gained is the size of the files. On a CPU they stay packed and are multiplied by
Halve's kernels. Mixtures of experts are refused. Tested with vLLM 0.32 on a CPU, and
not on a GPU.
"""

from importlib import import_module


def register() -> None:
    """Register `quant_method: halve` with vLLM; may be called any number of times."""
    import_module("halve.integrations.vllm.quantization")
