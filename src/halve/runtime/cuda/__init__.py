"""Packed layers on NVIDIA GPUs."""
