"""Everything that runs a model: here block by block, and whole for generation."""
