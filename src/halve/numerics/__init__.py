"""Fast float32 products, compensated sums, learning rates and finite numbers."""
