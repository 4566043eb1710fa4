"""Run models: block by block, and whole for generation."""
