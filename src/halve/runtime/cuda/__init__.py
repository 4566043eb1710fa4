"""Kernels for NVIDIA GPUs, in Triton, and what decides when they run.

Nothing here knows the layers or formats. `side_index` and `launch` are plain torch and
Python; `support` says whether the kernels can run on a device. The other modules import
Triton at their top and are imported only where `support` says so.
"""
