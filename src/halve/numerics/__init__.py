"""Numerics that torch lacks on a CPU: fast float32 products, compensated sums, finiteness."""
