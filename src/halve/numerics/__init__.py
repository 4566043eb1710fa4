"""Fast float32 products, compensated sums and a check for finite numbers."""
