"""Packed layers on the CPU: compiled kernels, torch operators, modules."""
